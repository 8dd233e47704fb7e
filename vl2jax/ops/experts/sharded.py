"""Routed experts placed on the `expert` axis of a mesh: tokens travel, weights stay; no token is
dropped.

Every device has the experts of its place on `expert`, split over `fsdp` (gathered for use) and
`tensor` (the expert width). What moves is rows: a token goes to each place that has experts of its
choice, once, with its K choices; there they are computed and summed, and the sums come back.

Suffixes: R rows that a device has received, K experts per token, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from vl2jax.ops.experts import AUTO, ExpertWeights, routed_experts
from vl2jax.ops.experts.exchange import EXCHANGES, choose_exchange
from vl2jax.ops.matmul.int8 import Int8, Weight, split_like
from vl2jax.parallel.mesh import axis_size, batch_axes, batch_shards


def sharded_experts(
    mesh: AbstractMesh,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    w: ExpertWeights,
    *,
    implementation: str = AUTO,
    layer: jax.Array | None = None,
    exchange: str | None = None,
) -> jax.Array:
    """The weighted sum of each token's experts.

    Rows that the mesh divides stay where they are; else tokens are split over all batch axes; few
    tokens (decoding) are computed everywhere, each device with its experts, and only sums move.

    Args:
      mesh: in force.
      x: [B, T, D].
      weights: float32[B, T, K].
      experts: int32[B, T, K].
      w: weights of a layer [E, ...], or of many layers [L, E, ...] with `layer`.
      implementation: see `routed_experts`; computes local experts.
      layer: int32[], which one of w's layers; None: w is of one layer.
      exchange: a name in `EXCHANGES`; None: by platform and width of the axis.

    Returns:
      [B, T, D] in the dtype of x.
    """
    exchange = exchange or choose_exchange(mesh, experts.shape[-1])
    shards, shape = batch_shards(mesh), x.shape
    rows: tuple[str, ...] | None = batch_axes(mesh)
    if shape[0] % shards:
        x, weights, experts = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
        if len(x) % shards or len(x) < shards * shards:
            rows, exchange = None, "none" if exchange == "none" else "sum"
    present = tuple(a if a in mesh.axis_names else None for a in ("expert", "fsdp", "tensor"))
    place, fsdp, tensor = present
    lead = () if layer is None else (None,)
    wide, narrow = (
        PartitionSpec(*lead, place, fsdp, tensor),
        PartitionSpec(*lead, place, tensor, fsdp),
    )
    layers = () if layer is None else (layer,)
    body = functools.partial(_on_one_device, mesh, implementation, exchange)
    y = jax.shard_map(
        body,
        in_specs=(
            *(PartitionSpec(rows),) * 3,
            ExpertWeights(*map(_split, w, (wide, wide, narrow))),
            *(PartitionSpec(),) * len(layers),
        ),
        out_specs=PartitionSpec(rows),
        check_vma=False,
    )(x, weights, experts, w, *layers)
    return y.reshape(shape)


def _on_one_device(mesh, implementation, exchange, x, weights, experts, w, layer=None):
    """The part of one device: its tokens, its experts."""
    local, shape = w.gate.shape[-3], x.shape
    options = {"implementation": implementation}
    if axis_size(mesh, "fsdp") > 1:
        if layer is not None:  # of one layer only: the experts of all together are too many
            w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), w)
            layer = None
        gather = functools.partial(_whole, x.dtype)
        w = ExpertWeights(gather(1, w.gate), gather(1, w.up), gather(2, w.down))
    if layer is not None:
        w = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w)
        options |= {"first": layer * local, "n_experts": local}
    first = jax.lax.axis_index("expert") * local if axis_size(mesh, "expert") > 1 else 0

    def compute(x_RD, weights_RK, experts_RK):
        own_RK = experts_RK - first
        here_RK = (own_RK >= 0) & (own_RK < local)
        own_RK = jnp.where(here_RK, own_RK, local)  # `local`: computed elsewhere
        return routed_experts(x_RD, jnp.where(here_RK, weights_RK, 0), own_RK, w, **options)

    x, weights, experts = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
    y = EXCHANGES[exchange](compute, local, x, weights, experts)
    if axis_size(mesh, "tensor") > 1:
        y = _sum_over_tensor(y)
    return y.reshape(shape)


def _split(weight: Weight, spec: PartitionSpec) -> Any:
    """[..., E, inputs, outputs]"""
    return split_like(weight, spec, axes=(-2,))


def _whole(dtype, axis: int, part: Weight) -> Weight:
    """A weight [E, inputs, outputs] whole along its axis split over `fsdp`; int8 travels as it is,
    with its scale where this is an axis of the outputs."""
    if not isinstance(part, Int8):
        return _gather_weight(dtype, axis, part)
    values: Any = _gather_weight(jnp.int8, axis, part.values)
    scale: Any = part.scale if axis == 1 else _gather_weight(jnp.float32, axis, part.scale)
    return Int8(values, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_weight(dtype, axis: int, part: jax.Array) -> jax.Array:
    """A weight whole along its axis split over `fsdp`, cast before it travels.

    Its gradient is summed over `fsdp` in float32 and split again.
    """
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_weight_forward(dtype, axis, part):
    return _gather_weight(dtype, axis, part), part[:0]  # the latter tells the dtype


def _gather_weight_backward(dtype, axis, like, g):
    g = g.astype(jnp.promote_types(jnp.float32, like.dtype))
    g = jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True)
    return (g.astype(like.dtype),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


@jax.custom_vjp
def _sum_over_tensor(y: jax.Array) -> jax.Array:
    return jax.lax.psum(y, "tensor")


# All devices along `tensor` hold the same sum, so `shard_map` hands each an equal share of its
# gradient: the whole is a multiple, and no second sum over the axis is needed.
_sum_over_tensor.defvjp(
    lambda y: (_sum_over_tensor(y), None),
    lambda _, g: (g * jax.lax.axis_size("tensor"),),
)
