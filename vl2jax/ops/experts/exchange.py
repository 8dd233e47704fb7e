"""How tokens travel to the places of their experts on the `expert` axis, and sums back.

Suffixes: n tokens of a device, R rows it has received, K experts per token, D width, P rows it
sends; S places on the expert axis.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from vl2jax.ops.names import EXCHANGED
from vl2jax.parallel.mesh import axis_size

# Where it can be done, rows are sent only where they are needed if that moves at most this part of
# what sending them everywhere moves: with six experts per token from 8 places on (55%; 82% at 4,
# 32% at 16). Above that it is not worth the sorting and the scattered sums.
RAGGED_WORTH = 0.6
RAGGED_PLATFORMS = ("tpu", "cuda", "rocm", "gpu")

# Of a device's rows: x [n, D], weights float32 [n, K], experts int32 [n, K] -> sums [n, D].
Compute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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
