"""Where hand-written TPU kernels run: in programs for TPU, on each device's part of the data."""

import contextlib
import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType

from vl2jax.parallel.mesh import current_mesh

# Part of the cache keys of jit, so a program traced for one platform is not taken for another.
_platform = jax.make_user_context(None)


def compiling_for(platform: str) -> contextlib.AbstractContextManager:
    """Within it programs are traced for `platform`, whatever runs here."""
    return _platform(platform)


def on_tpu() -> bool:
    """Whether the program that is being traced is for TPU."""
    return (_platform.value or jax.default_backend()) == "tpu"


def on_cpu() -> bool:
    """Whether the program that is being traced is for CPU."""
    return (_platform.value or jax.default_backend()) == "cpu"


def per_device(run: Callable, in_specs, out_specs) -> Callable:
    """`run` on each device's part, for the compiler cannot split a kernel by itself.

    Without a mesh, or inside a `shard_map` over all of its axes, `run` itself.
    """
    mesh = current_mesh()
    if mesh is None or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def split(size: int, *axes: str) -> tuple[str, ...] | None:
    """The mesh axes, of those given, over which an axis of this size is split; None: not at all."""
    mesh = current_mesh()
    present = tuple(axis for axis in axes if mesh is not None and axis in mesh.axis_names)
    divides = present and size % math.prod(mesh.shape[axis] for axis in present) == 0
    return present if divides else None
