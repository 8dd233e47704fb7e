"""The platform for which a program is traced: that of the arrays it computes with."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

# A JAX user context is part of jit's cache key: a program traced for one platform is not reused for
# another.
_compiling_for = jax.make_user_context(None)


def compiling_for(name: str) -> contextlib.AbstractContextManager:
    """Context manager in which programs are traced for `name`.

    Args:
      name: "cpu", "gpu" or "tpu".
    """
    return _compiling_for(name)


def traced_for(name: str) -> Callable[[Callable], Callable]:
    """Decorator of functions to be jitted: they are traced for `name`, wherever they are called.

    Args:
      name: "cpu", "gpu" or "tpu".
    """

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def traced(*args: Any, **options: Any) -> Any:
            with compiling_for(name):
                return function(*args, **options)

        return traced

    return wrap


def platform() -> str:
    """The platform for which programs are traced now: "cpu", "gpu" or "tpu".

    It is that of `compiling_for`; else that of the current mesh; else that of JAX's default device.
    """
    if _compiling_for.value:
        return _compiling_for.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = default_device().platform if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def default_device() -> jax.Device:
    """The device of arrays that are put on no other: that of `jax.default_device`, or the first."""
    config: Any = jax.config  # its type does not list JAX's options
    device = config.jax_default_device
    if isinstance(device, jax.Device):
        return device
    return jax.local_devices(backend=device)[0]


def platform_of(tree: Any) -> str:
    """The platform of the devices that hold the arrays of a tree: "cpu", "gpu" or "tpu".

    Inside `compiling_for`, and for trees of shapes or tracers, it is that of `platform()`.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if _compiling_for.value or not leaves or isinstance(leaves[0], Tracer):
        return platform()
    return next(iter(leaves[0].sharding.device_set)).platform
