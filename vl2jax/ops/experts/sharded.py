"""Expert parallelism: experts are sharded over the `expert` axis of a mesh; no token is dropped.

The weights of an expert shard are also sharded over `fsdp` (all-gathered before use) and `tensor`
(expert width).  A token is sent, with its K choices, to the shards that have experts of its choice,
or by an all-gather to all shards.  Each shard computes its experts among the K and sends back their
weighted sum.

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
from vl2jax.parallel.mesh import axis_size, batch_axes, batch_shards, constrain
from vl2jax.parallel.sharding import param_spec


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
    """Computes the weighted sum of each token's experts, on a mesh.

    If the batch axes divide B, every device keeps its rows.  Otherwise tokens are sharded over the
    batch axes.  Few tokens (decoding) are replicated: each device computes its own experts on all
    of them, and only the sums are exchanged.

    Args:
      mesh: the current mesh.
      x: [B, T, D].
      weights: float32[B, T, K], gate values.
      experts: int32[B, T, K], ids of the chosen experts.
      w: weights of one layer [E, ...], or of several layers [L, E, ...].
      implementation: how local experts are computed, see `routed_experts`.
      layer: int32[], the index of the layer in w; None: w has one layer.
      exchange: a name in `EXCHANGES`; None: chosen by platform and size of the axis.

    Returns:
      [B, T, D] in the dtype of x.
    """
    exchange = exchange or choose_exchange(mesh, experts.shape[-1])
    shards, shape = batch_shards(mesh), x.shape
    rows: tuple[str, ...] | None = batch_axes(mesh)
    if shape[0] % shards:
        # Tokens of a replicated array are split without communication.  From another sharding, XLA
        # would go over the replicated array as well, at a place of its own choice.
        tokens = (constrain(a) for a in (x, weights, experts))
        x, weights, experts = (a.reshape(-1, a.shape[-1]) for a in tokens)
        if len(x) % shards or len(x) < shards * shards:
            rows, exchange = None, "none" if exchange == "none" else "sum"
    layers = () if layer is None else (layer,)
    body = functools.partial(_on_one_device, mesh, implementation, exchange)
    y = jax.shard_map(
        body,
        in_specs=(
            *(PartitionSpec(rows),) * 3,
            ExpertWeights(*map(_split, w, _specs(mesh, stacked=layer is not None))),
            *(PartitionSpec(),) * len(layers),
        ),
        out_specs=PartitionSpec(rows),
        check_vma=False,
    )(x, weights, experts, w, *layers)
    return (constrain(y) if shape[0] % shards else y).reshape(shape)


def _specs(mesh: AbstractMesh, stacked: bool) -> list[PartitionSpec]:
    """Specs of gate, up and down as in `sharding.PARAM_RULES`, without axes that the mesh lacks."""
    found = []
    for name in ("gate", "up", "down"):
        rule = param_spec(f"decoder/moe_0/mlp/experts/{name}_proj")  # with an axis of layers
        axes = (axis if axis in mesh.axis_names else None for axis in rule[0 if stacked else 1 :])
        found.append(PartitionSpec(*axes))
    return found


def _on_one_device(mesh, implementation, exchange, x, weights, experts, w, layer=None):
    """Runs on each device, with its tokens and its shard of the experts."""
    n_local, shape = w.gate.shape[-3], x.shape
    options = {"implementation": implementation}
    if axis_size(mesh, "fsdp") > 1:
        if layer is not None:  # slice first, to gather the experts of one layer only
            w = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), w)
            layer = None
        gather = functools.partial(_gather, x.dtype)
        w = ExpertWeights(gather(1, w.gate), gather(1, w.up), gather(2, w.down))
    if layer is not None:
        w = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), w)
        options |= {"first": layer * n_local, "n_experts": n_local}
    first = jax.lax.axis_index("expert") * n_local if axis_size(mesh, "expert") > 1 else 0

    def compute(x_RD, weights_RK, experts_RK):
        local_RK = experts_RK - first
        is_local_RK = (local_RK >= 0) & (local_RK < n_local)
        local_RK = jnp.where(is_local_RK, local_RK, n_local)  # the id for experts of other shards
        return routed_experts(x_RD, jnp.where(is_local_RK, weights_RK, 0), local_RK, w, **options)

    x, weights, experts = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
    y = EXCHANGES[exchange](compute, n_local, x, weights, experts)
    if axis_size(mesh, "tensor") > 1:
        y = _sum_over_tensor(y)
    return y.reshape(shape)


def _split(weight: Weight, spec: PartitionSpec) -> Any:
    """The partition spec of a weight [..., E, inputs, outputs]."""
    return split_like(weight, spec, axes=(-2,))


def _gather(dtype, axis: int, part: Weight) -> Weight:
    """All-gathers a weight [E, inputs, outputs] over `fsdp` along `axis`.

    An int8 weight is gathered as int8.  Its scale is gathered only if `axis` is the output axis.
    """
    if not isinstance(part, Int8):
        return _gather_weight(dtype, axis, part)
    values: Any = _gather_weight(jnp.int8, axis, part.values)
    scale: Any = part.scale if axis == 1 else _gather_weight(jnp.float32, axis, part.scale)
    return Int8(values, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_weight(dtype, axis: int, part: jax.Array) -> jax.Array:
    """Casts a shard to `dtype` and all-gathers it over `fsdp`.

    The gradient is reduce-scattered over `fsdp` in float32.
    """
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_weight_forward(dtype, axis, part):
    return _gather_weight(dtype, axis, part), part[:0]  # empty; carries the dtype


def _gather_weight_backward(dtype, axis, like, g):
    g = g.astype(jnp.promote_types(jnp.float32, like.dtype))
    g = jax.lax.psum_scatter(g, "fsdp", scatter_dimension=axis, tiled=True)
    return (g.astype(like.dtype),)


_gather_weight.defvjp(_gather_weight_forward, _gather_weight_backward)


@jax.custom_vjp
def _sum_over_tensor(y: jax.Array) -> jax.Array:
    """All-reduces over `tensor`."""
    return jax.lax.psum(y, "tensor")


# All devices along `tensor` hold the same sum, so `shard_map` gives each an equal share of its
# gradient.  The full gradient is the share times the size of the axis; no all-reduce is needed.
_sum_over_tensor.defvjp(
    lambda y: (_sum_over_tensor(y), None),
    lambda _, g: (g * jax.lax.axis_size("tensor"),),
)
