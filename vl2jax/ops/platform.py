"""The platform that a program is traced for."""

import contextlib
from typing import Any

import jax
from jax.core import Tracer

# Part of jit's cache keys, so that a program traced for one platform is not taken for another.
_compiling_for = jax.make_user_context(None)


def compiling_for(name: str) -> contextlib.AbstractContextManager:
    """Within it programs are traced for this platform, whatever runs here.

    Args:
      name: "cpu", "gpu" or "tpu".
    """
    return _compiling_for(name)


def platform() -> str:
    """The platform of the program that is being traced: "cpu", "gpu" or "tpu"."""
    return _compiling_for.value or jax.default_backend()


def platform_of(tree: Any) -> str:
    """The platform that a program for these arrays is compiled for: where they lie.

    Where `compiling_for` says otherwise, or they lie nowhere (shapes), as `platform`.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if _compiling_for.value or not leaves or isinstance(leaves[0], Tracer):
        return platform()
    return next(iter(leaves[0].sharding.device_set)).platform
