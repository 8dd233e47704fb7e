"""The platform for which a program is traced."""

import contextlib
from typing import Any

import jax
from jax.core import Tracer

# A JAX user context is part of jit's cache key: a program traced for one platform is not reused for
# another.
_compiling_for = jax.make_user_context(None)


def compiling_for(name: str) -> contextlib.AbstractContextManager:
    """Context manager in which programs are traced for `name`, not for the default backend.

    Args:
      name: "cpu", "gpu" or "tpu".
    """
    return _compiling_for(name)


def platform() -> str:
    """The platform for which programs are traced now: "cpu", "gpu" or "tpu"."""
    return _compiling_for.value or jax.default_backend()


def platform_of(tree: Any) -> str:
    """The platform of the devices that hold the arrays of a tree: "cpu", "gpu" or "tpu".

    Inside `compiling_for`, and for trees of shapes or tracers, it is that of `platform()`.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if _compiling_for.value or not leaves or isinstance(leaves[0], Tracer):
        return platform()
    return next(iter(leaves[0].sharding.device_set)).platform
