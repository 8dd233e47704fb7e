"""The mesh in force while a program is traced, and where activations lie on it.

Mesh axes: `data` (copies of the parameters), `fsdp` (every large parameter split), `expert`
(experts placed), `tensor` (heads, ffn width, vocabulary). A mesh may leave axes out. Model code
knows no mesh: `jax.set_mesh` puts one in force around the call of a jitted function, and without
one everything here does nothing.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the axes that rows and tiles are split over


def current_mesh() -> AbstractMesh | None:
    """The mesh in force; None without one, and where it has a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def batch_axes(mesh) -> tuple[str, ...]:
    """The axes of a mesh that rows and tiles are split over."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def batch_shards(mesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def axis_size(mesh, axis: str) -> int:
    """Devices along an axis; 1 where the mesh leaves it out."""
    return mesh.shape.get(axis, 1)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Says where an activation lies.

    Args:
      x: any array.
      axes: for each of its leading axes the mesh axis (or axes) it is split over; None, and what is
        left out: not split. Axes that the mesh lacks are ignored.

    Returns:
      The same array; as it was where there is no mesh. An axis whose size the mesh does not divide
      is not split.
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
    """Puts the mesh in force that the arrays of a tree lie on, where they lie on one.

    A mesh that is in force already stays; so does none where the arrays are traced.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if not leaves or isinstance(leaves[0], Tracer) or current_mesh() is not None:
        return contextlib.nullcontext()
    sharding = leaves[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return contextlib.nullcontext()
    mesh: Any = sharding.mesh
    return jax.set_mesh(mesh)


def on_each_device(run: Callable, in_specs, out_specs) -> Callable:
    """`run` on each device's part, for the compiler cannot split a kernel by itself.

    Without a mesh, or inside a `shard_map` over all of its axes, `run` itself.
    """
    mesh = current_mesh()
    if mesh is None or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def dividing_axes(size: int, *axes: str) -> tuple[str, ...] | None:
    """The mesh axes, of those given, over which an axis of this size is split; None: not at all."""
    mesh = current_mesh()
    if mesh is None:
        return None
    present = tuple(axis for axis in axes if axis in mesh.axis_names)
    divides = present and size % math.prod(mesh.shape[axis] for axis in present) == 0
    return present if divides else None
