"""Communication of expert parallelism: sends tokens to their experts, and sums back.

Suffixes: n tokens of a device, R rows it has received, K experts per token, D width, P rows it
sends; S shards of the `expert` axis.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from vl2jax.ops.names import EXCHANGED
from vl2jax.parallel.mesh import axis_size

# The ragged exchange sends rows only to the shards that need them.  It is chosen if it sends at
# most this fraction of what an all-gather sends; above, the sorting and the scattered sums cost
# more than they save.  With six experts per token it sends 82% with 4 shards, 55% with 8 and 32%
# with 16.
MAX_RAGGED_FRACTION = 0.6
RAGGED_PLATFORMS = ("tpu", "cuda", "rocm", "gpu")

# Computes a shard's experts: x [R, D], weights float32[R, K], experts int32[R, K] -> sums [R, D].
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def choose_exchange(mesh: AbstractMesh, top_k: int) -> str:
    """Chooses the exchange for a mesh.

    Args:
      mesh: the current mesh.
      top_k: K.

    Returns:
      "none" if the `expert` axis has one shard.  "ragged" if the platform supports it and it sends
      much less than an all-gather (see `MAX_RAGGED_FRACTION`).  Otherwise "gather".
    """
    width, device = axis_size(mesh, "expert"), mesh.abstract_device
    if width == 1:
        return "none"
    if device is None or device.platform not in RAGGED_PLATFORMS:
        return "gather"
    part = rows_sent("ragged", width, top_k) / rows_sent("gather", width, top_k)
    return "ragged" if part <= MAX_RAGGED_FRACTION else "gather"


def rows_sent(exchange: str, width: int, top_k: int) -> float:
    """Rows that a device sends for each of its tokens; the same number is sent back.

    Args:
      exchange: "gather" and "all_to_all" send a token to all other shards, "ragged" to those that
        have experts of its choice; for "ragged" this is the expectation under uniform routing.
      width: number of shards of the `expert` axis.
      top_k: K.
    """
    others = width - 1
    return others * (1 - (1 - 1 / width) ** top_k) if exchange == "ragged" else float(others)


def _none(compute: Compute, n_local: int, *tokens: jax.Array) -> jax.Array:
    """No exchange: the device has all experts."""
    return compute(*tokens)


def _sum(compute: Compute, n_local: int, *tokens: jax.Array) -> jax.Array:
    """All-reduce of the sums; every shard has the same tokens."""
    return jax.lax.psum(compute(*tokens), "expert")


def _gather(compute: Compute, n_local: int, *tokens: jax.Array) -> jax.Array:
    """All-gather of the tokens, then reduce-scatter of the sums."""
    rows = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in tokens)
    y_RD = compute(*(checkpoint_name(a, EXCHANGED) for a in rows))
    return jax.lax.psum_scatter(y_RD, "expert", scatter_dimension=0, tiled=True)


def _destinations(n_local: int, experts_nK: jax.Array) -> jax.Array:
    """bool[S, n]: whether shard s has experts of token n's choice."""
    n_shards = jax.lax.axis_size("expert")
    return jax.nn.one_hot(experts_nK // n_local, n_shards, dtype=jnp.bool_).any(axis=1).T


def _all_to_all(compute: Compute, n_local: int, x, weights, experts) -> jax.Array:
    """All-to-all of a block of n rows per shard: the rows that it needs first, then empty rows."""
    needed_Sn = _destinations(n_local, experts)
    order_Sn = jnp.argsort(~needed_Sn, axis=1, stable=True)
    filled_Sn1 = jnp.take_along_axis(needed_Sn, order_Sn, axis=1)[..., None]

    def send(a: jax.Array, empty) -> jax.Array:
        blocks = jnp.where(filled_Sn1, a[order_Sn], empty)
        blocks = jax.lax.all_to_all(blocks, "expert", 0, 0)
        return checkpoint_name(blocks.reshape(-1, a.shape[-1]), EXCHANGED)

    y_RD = compute(send(x, 0), send(weights, 0), send(experts, -1))
    y_SnD = jax.lax.all_to_all(y_RD.reshape(*order_Sn.shape, -1), "expert", 0, 0)
    y_SnD = jnp.where(filled_Sn1, y_SnD, 0).astype(jnp.float32)
    inverse_Sn = jnp.argsort(order_Sn, axis=1)
    y_SnD = jnp.take_along_axis(y_SnD, inverse_Sn[..., None], axis=1)
    return y_SnD.sum(axis=0).astype(x.dtype)


def _ragged(compute: Compute, n_local: int, x, weights, experts) -> jax.Array:
    """Ragged all-to-all: sends each shard only the rows that it needs."""
    needed_Sn = _destinations(n_local, experts)
    (n_shards, n), top_k = needed_Sn.shape, experts.shape[-1]
    max_rows = n * min(top_k, n_shards)  # a token is sent to at most min(K, S) shards
    order_P = jnp.argsort(~needed_Sn.reshape(-1), stable=True)[:max_rows]  # sorted by shard
    token_P = order_P % n
    shard = jax.lax.axis_index("expert")
    send_S = needed_Sn.sum(axis=1, dtype=jnp.int32)
    counts_SS = jax.lax.all_gather(send_S, "expert")  # [from, to]
    receive_S = counts_SS[:, shard]

    def offsets(counts: jax.Array, axis: int) -> jax.Array:
        """Exclusive cumulative sum: offsets from counts."""
        return jnp.cumsum(counts, axis=axis) - counts

    send_plan = (offsets(send_S, 0), send_S, offsets(counts_SS, 0)[shard], receive_S)
    return_plan = (offsets(receive_S, 0), receive_S, offsets(counts_SS, 1)[:, shard], send_S)

    def exchange_rows(a: jax.Array, n_rows: int, plan) -> jax.Array:
        empty = jnp.zeros((n_rows, a.shape[-1]), a.dtype)
        return jax.lax.ragged_all_to_all(a, empty, *plan, axis_name="expert")

    # Expert ids plus 1 are sent with the gate values.  Rows of the receive buffer that stay empty
    # are 0, which is id -1: no expert.
    choices = jnp.concatenate([weights, (experts + 1).astype(weights.dtype)], axis=-1)
    x_RD, choices = (
        checkpoint_name(exchange_rows(a[token_P], n_shards * n, send_plan), EXCHANGED)
        for a in (x, choices)
    )
    weights_RK, experts_RK = jnp.split(choices, 2, axis=-1)
    y_RD = compute(x_RD, weights_RK, experts_RK.astype(jnp.int32) - 1)
    y_PD = exchange_rows(y_RD, max_rows, return_plan).astype(jnp.float32)
    return jnp.zeros(x.shape, jnp.float32).at[token_P].add(y_PD).astype(x.dtype)


EXCHANGES = {
    "none": _none,
    "sum": _sum,
    "gather": _gather,
    "all_to_all": _all_to_all,
    "ragged": _ragged,
}
