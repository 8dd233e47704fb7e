"""The current mesh while a program is traced, and sharding constraints on activations.

Mesh axes: `data` (replicates the parameters), `fsdp` (shards every large parameter), `expert`
(shards the experts), `tensor` (shards heads, ffn width and vocabulary).  A mesh may omit axes.
Model code takes no mesh argument: callers of a jitted function set the mesh with `jax.set_mesh`.
Without a mesh, the functions here do nothing.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the axes that shard rows and tiles


def current_mesh() -> AbstractMesh | None:
    """Returns the current mesh; None if there is none or it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def batch_axes(mesh) -> tuple[str, ...]:
    """Returns the axes of a mesh that shard rows and tiles."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def batch_shards(mesh) -> int:
    """Returns the number of parts into which a mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def axis_size(mesh, axis: str) -> int:
    """Returns the number of devices along an axis; 1 if the mesh omits it."""
    return mesh.shape.get(axis, 1)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the sharding of an activation.

    Args:
      x: any array.
      axes: for each leading axis of `x` the mesh axis or axes that shard it; None, and axes that
        are not given: replicated.  Mesh axes that the mesh omits are ignored.  An axis whose size
        is not divisible is replicated.

    Returns:
      `x` with the constraint; `x` unchanged if there is no mesh.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    spec = []
    for size, wanted in zip(x.shape, axes, strict=False):
        names = (wanted,) if isinstance(wanted, str) else wanted or ()
        names = tuple(name for name in names if name in mesh.axis_names)
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        spec.append(names if names and divides else None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def mesh_of(tree) -> contextlib.AbstractContextManager:
    """Context manager that makes the mesh of a tree's arrays the current mesh.

    It does nothing if there is already a current mesh, if the arrays are traced, or if they are not
    on a mesh of several devices.

    Args:
      tree: pytree; its first array determines the mesh.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if not leaves or isinstance(leaves[0], Tracer) or current_mesh() is not None:
        return contextlib.nullcontext()
    sharding = leaves[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return contextlib.nullcontext()
    mesh: Any = sharding.mesh
    return jax.set_mesh(mesh)


def spans_processes(tree) -> bool:
    """Whether some arrays of a tree lie on devices of several processes."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return not all(leaf.is_fully_addressable for leaf in leaves)


def on_each_device(run: Callable, in_specs, out_specs) -> Callable:
    """Wraps a function in `shard_map`, because the compiler cannot partition a kernel by itself.

    Args:
      run: function of the arrays on one device.
      in_specs: `PartitionSpec`s of its arguments.
      out_specs: `PartitionSpec`s of its results.

    Returns:
      The wrapped function; `run` itself if there is no mesh or the code is already inside a
      `shard_map` over all its axes.
    """
    mesh = current_mesh()
    if mesh is None or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sharded(size: int, axis: str) -> bool:
    """Whether the current mesh splits an array axis of this size along `axis`."""
    mesh = current_mesh()
    parts = 1 if mesh is None else axis_size(mesh, axis)
    return parts > 1 and size % parts == 0


def dividing_axes(size: int, *axes: str) -> tuple[str, ...] | None:
    """Returns which of the given mesh axes can shard an array axis.

    Args:
      size: size of the array axis.
      axes: mesh axes.

    Returns:
      Those that the current mesh has; None if there are none or they do not divide the size.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    present = tuple(axis for axis in axes if axis in mesh.axis_names)
    divides = present and size % math.prod(mesh.shape[axis] for axis in present) == 0
    return present if divides else None
