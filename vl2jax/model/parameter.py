"""Parameters of modules: created by `init`, looked up by `apply`."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

_shapes_only = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Context manager in which `init` fills parameters with zeros, for callers that need shapes.

    Tracing the random initializers takes a large part of the time to trace `init`.
    """
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def parameter(
    module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype
) -> Any:
    """Returns a parameter of a module; creates it with `init(key, shape, dtype)` under `init`.

    Does the same as `module.param`, but faster: to check the shape, `module.param` traces the
    initializer at every use, which takes a tenth of the time to trace a program.

    Returns:
      A `Weight`: an array, or an `Int8` if the model is quantised.  Norms, biases and embeddings
      are always arrays.

    Raises:
      ValueError: the parameter is missing or has another shape.
    """
    if module.is_initializing():
        init = nn.initializers.zeros if _shapes_only.get() else init
        return module.param(name, init, shape, dtype)
    value = module.get_variable("params", name)
    if value is None or value.shape != shape:
        found = "missing" if value is None else f"of shape {value.shape}"
        path = "/".join((*module.path, name))
        raise ValueError(f"parameter {path} is {found}; the model has one of shape {shape}")
    return value
