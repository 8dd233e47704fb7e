"""The parameters of modules: drawn once, then looked up."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

_shapes_alone = contextvars.ContextVar("shapes_alone", default=False)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it parameters are zeros at first, for those who ask for their shapes alone: to draw
    them is a good part of what has to be traced to initialize a model."""
    token = _shapes_alone.set(True)
    try:
        yield
    finally:
        _shapes_alone.reset(token)


def parameter(
    module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], dtype
) -> Any:
    """A parameter of a module, drawn by `init(key, shape, dtype)` while it is initialized.

    It is a `Weight`; norms, biases and embeddings are always arrays.  As `module.param` but for its
    check of the shape, which traces `init` at every use: a tenth of the time that it takes to trace
    a program.
    """
    if module.is_initializing():
        init = nn.initializers.zeros if _shapes_alone.get() else init
        return module.param(name, init, shape, dtype)
    value = module.get_variable("params", name)
    if value is None or value.shape != shape:
        found = "missing" if value is None else f"of shape {value.shape}"
        path = "/".join((*module.path, name))
        raise ValueError(f"parameter {path} is {found}; the model has one of shape {shape}")
    return value
