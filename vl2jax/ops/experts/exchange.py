"""Routed experts placed on the `expert` axis of a mesh: tokens travel, weights stay; no token is
dropped.

Every device has the experts of its place on `expert`, split over `fsdp` (gathered for use) and
`tensor` (the expert width). What moves is rows: a token goes to each place that has experts of its
choice, once, with its K choices; there they are computed and summed, and the sums come back.

Suffixes: n tokens of a device, R rows it has received, K experts per token, D width, P rows it
sends; S places on the expert axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, PartitionSpec

from vl2jax.model.layers import EXCHANGED
from vl2jax.ops.experts.xla import ExpertWeights
from vl2jax.ops.int8 import Int8, Weight, split_like
from vl2jax.parallel.mesh import axis_size, batch_axes, batch_shards

# Where it can be done, rows are sent only where they are needed if that moves at most this part of
# what sending them everywhere moves: with six experts per token from 8 places on (55%; 82% at 4,
# 32% at 16). Above that it is not worth the sorting and the scattered sums.
RAGGED_WORTH = 0.6
RAGGED_PLATFORMS = ("tpu", "cuda", "rocm", "gpu")

# Of a device's rows: x [n, D], weights float32 [n, K], experts int32 [n, K] -> sums [n, D].
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def expert_parallel(
    mesh: AbstractMesh,
    x: jax.Array,
    weights: jax.Array,
    experts: jax.Array,
    w: ExpertWeights,
    implementation: Callable[..., jax.Array],
    *,
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
      implementation: of `experts.IMPLEMENTATIONS`; computes local experts.
      layer: int32[], which one of w's; the implementation is then given `first`, `n_experts`.
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


def choose_exchange(mesh: AbstractMesh, top_k: int) -> str:
    """The form that moves least among those that the platform has; the plain one if not by much."""
    width, device = axis_size(mesh, "expert"), mesh.abstract_device
    if width == 1:
        return "none"
    if device is None or device.platform not in RAGGED_PLATFORMS:
        return "gather"
    part = rows_sent("ragged", width, top_k) / rows_sent("gather", width, top_k)
    return "ragged" if part <= RAGGED_WORTH else "gather"


def rows_sent(exchange: str, width: int, top_k: int) -> float:
    """Rows that a device sends for each of its tokens; as many come back.

    Args:
      exchange: "gather" and "all_to_all" send a token to all other places, "ragged" to those that
        have experts of its choice: how many, is what is to be expected of an even choice.
      width: places on the axis.
      top_k: experts per token.
    """
    others = width - 1
    return others * (1 - (1 - 1 / width) ** top_k) if exchange == "ragged" else float(others)


def _on_one_device(mesh, implementation, exchange, x, weights, experts, w, layer=None):
    """The part of one device: its tokens, its experts."""
    local, shape = w.gate.shape[-3], x.shape
    options = {}
    if axis_size(mesh, "fsdp") > 1:
        if layer is not None:  # of one layer only: the experts of all together are too many
            w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), w)
            layer = None
        gather = functools.partial(_whole, x.dtype)
        w = ExpertWeights(gather(1, w.gate), gather(1, w.up), gather(2, w.down))
    if layer is not None:
        w = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w)
        options = {"first": layer * local, "n_experts": local}
    first = jax.lax.axis_index("expert") * local if axis_size(mesh, "expert") > 1 else 0

    def compute(x_RD, weights_RK, experts_RK):
        own_RK = experts_RK - first
        here_RK = (own_RK >= 0) & (own_RK < local)
        own_RK = jnp.where(here_RK, own_RK, local)  # `local`: computed elsewhere
        return implementation(x_RD, jnp.where(here_RK, weights_RK, 0), own_RK, w, **options)

    x, weights, experts = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
    y = EXCHANGES[exchange](compute, local, x, weights, experts)
    if axis_size(mesh, "tensor") > 1:
        y = _sum_over_tensor(y)
    return y.reshape(shape)


def _split(weight: Weight, spec: PartitionSpec):
    """[..., E, inputs, outputs]"""
    return split_like(weight, spec, axes=(-2,))


def _whole(dtype, axis: int, part: Weight) -> Weight:
    """A weight [E, inputs, outputs] whole along its axis split over `fsdp`; int8 travels as it is,
    with its scale where this is an axis of the outputs."""
    if not isinstance(part, Int8):
        return _gather_weight(dtype, axis, part)
    values = _gather_weight(jnp.int8, axis, part.values)
    scale = part.scale if axis == 1 else _gather_weight(jnp.float32, axis, part.scale)
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


def _none(compute: Compute, local: int, *tokens: jax.Array) -> jax.Array:
    """All experts are here."""
    return compute(*tokens)


def _sum(compute: Compute, local: int, *tokens: jax.Array) -> jax.Array:
    """Every device has the same few tokens; only the sums move."""
    return jax.lax.psum(compute(*tokens), "expert")


def _gather(compute: Compute, local: int, *tokens: jax.Array) -> jax.Array:
    """All-gather and reduce-scatter: every place sees all rows of its line of the mesh."""
    rows = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in tokens)
    y_RD = compute(*(checkpoint_name(a, EXCHANGED) for a in rows))
    return jax.lax.psum_scatter(y_RD, "expert", scatter_dimension=0, tiled=True)


def _destinations(local: int, experts_nK: jax.Array) -> jax.Array:
    """bool[S, n]: which places a token goes to."""
    places = jax.lax.axis_size("expert")
    return jax.nn.one_hot(experts_nK // local, places, dtype=jnp.bool_).any(axis=1).T


def _all_to_all(compute: Compute, local: int, x, weights, experts) -> jax.Array:
    """Blocks of n rows for every place, those that it needs in front, the rest empty."""
    going_Sn = _destinations(local, experts)
    order_Sn = jnp.argsort(~going_Sn, axis=1, stable=True)
    filled_Sn1 = jnp.take_along_axis(going_Sn, order_Sn, axis=1)[..., None]

    def send(a: jax.Array, empty) -> jax.Array:
        blocks = jnp.where(filled_Sn1, a[order_Sn], empty)
        blocks = jax.lax.all_to_all(blocks, "expert", 0, 0)
        return checkpoint_name(blocks.reshape(-1, a.shape[-1]), EXCHANGED)

    y_RD = compute(send(x, 0), send(weights, 0), send(experts, -1))
    y_SnD = jax.lax.all_to_all(y_RD.reshape(*order_Sn.shape, -1), "expert", 0, 0)
    y_SnD = jnp.where(filled_Sn1, y_SnD, 0).astype(jnp.float32)
    back = jnp.argsort(order_Sn, axis=1)
    y_SnD = jnp.take_along_axis(y_SnD, back[..., None], axis=1)
    return y_SnD.sum(axis=0).astype(x.dtype)


def _ragged(compute: Compute, local: int, x, weights, experts) -> jax.Array:
    """Rows one after the other, as many for each place as it needs."""
    going_Sn = _destinations(local, experts)
    (places, n), top_k = going_Sn.shape, experts.shape[-1]
    most = n * min(top_k, places)  # a token goes to no more places
    order_P = jnp.argsort(~going_Sn.reshape(-1), stable=True)[:most]  # place by place
    token_P = order_P % n
    me = jax.lax.axis_index("expert")
    send_S = going_Sn.sum(axis=1, dtype=jnp.int32)
    counts_SS = jax.lax.all_gather(send_S, "expert")  # from, to
    receive_S = counts_SS[:, me]

    def before(counts: jax.Array, axis: int) -> jax.Array:
        return jnp.cumsum(counts, axis=axis) - counts

    out = (before(send_S, 0), send_S, before(counts_SS, 0)[me], receive_S)
    back = (before(receive_S, 0), receive_S, before(counts_SS, 1)[:, me], send_S)

    def travel(a: jax.Array, room: int, way) -> jax.Array:
        empty = jnp.zeros((room, a.shape[-1]), a.dtype)
        return jax.lax.ragged_all_to_all(a, empty, *way, axis_name="expert")

    # Choices travel with their weights, as numbers from 1: where nothing arrives there is none.
    choices = jnp.concatenate([weights, (experts + 1).astype(weights.dtype)], axis=-1)
    x_RD, choices = (
        checkpoint_name(travel(a[token_P], places * n, out), EXCHANGED) for a in (x, choices)
    )
    weights_RK, experts_RK = jnp.split(choices, 2, axis=-1)
    y_RD = compute(x_RD, weights_RK, experts_RK.astype(jnp.int32) - 1)
    y_PD = travel(y_RD, most, back).astype(jnp.float32)
    return jnp.zeros(x.shape, jnp.float32).at[token_P].add(y_PD).astype(x.dtype)


EXCHANGES = {
    "none": _none,
    "sum": _sum,
    "gather": _gather,
    "all_to_all": _all_to_all,
    "ragged": _ragged,
}
