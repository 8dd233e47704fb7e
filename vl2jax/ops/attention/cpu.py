"""Attention on CPU: `xla.py` with chunks whose scores fit into the CPU's caches.

Axis legend: B rows, T queries, S keys, H heads, K query width, V value width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from vl2jax.ops.attention import xla
from vl2jax.ops.attention.visibility import Visibility
from vl2jax.parallel.mesh import current_mesh

SCORES = 1 << 21  # scores per chunk
# Heads are computed one at a time if one head has at least `HEAD_SCORES` scores and all heads of
# all rows have at least `ALL_SCORES`.  Ordered sequences are split into small products already, so
# their threshold per head is higher.
HEAD_SCORES, ORDERED_HEAD_SCORES, ALL_SCORES = 1 << 19, 1 << 22, 1 << 23
KEYS_FIRST = range(4, 65)  # numbers of queries for which `k q^T` is faster than `q k^T`


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None
) -> jax.Array:
    """Same arguments and result as `ops.attention.attention`."""
    one_query = q.shape[1] == 1 and k.shape[2] == q.shape[2] and current_mesh() is None
    if one_query:
        return _one_query(q, k, v, scale, visibility)
    return xla.attention(q, k, v, scale, visibility, _FORM)


def _one_query(q, k, v, scale, visibility) -> jax.Array:
    """One query per row, with the heads folded into the rows.

    With separate axes for heads and rows, XLA's CPU compiler computes such a bfloat16 product in
    float32.  It has no fast path for a single bfloat16 query, so a query of zeros is added (see
    `ops.matmul.cpu`).
    """
    rows, length, heads, _ = q.shape
    if q.dtype == jnp.bfloat16:
        length = 2
        q = jnp.pad(q, ((0, 0), (0, 1), (0, 0), (0, 0)))
    if visibility is not None:
        visibility = jax.tree.map(lambda a: jnp.repeat(a, heads, axis=0), visibility)
        visibility = visibility.repeat_queries(length)
    q, k, v = (a.swapaxes(1, 2).reshape(rows * heads, 1, a.shape[1], -1) for a in (q, k, v))
    y: Any = xla.by_heads(q, k, v, visibility, scale, _FORM)
    return y[:, :, :1].reshape(rows, heads, 1, -1).swapaxes(1, 2)


def _chunk(q: jax.Array, k: jax.Array, ordered: bool) -> int:
    length, per_query = q.shape[2], math.prod(k.shape[:3])
    target = max(SCORES // per_query, 64)
    if ordered:  # `EXTENTS` parts skip many scores and keep the products large
        most = max(4 * SCORES // per_query, 64)
        target = min(max(length // xla.EXTENTS, 64), 256, most)
    return -(-length // -(-length // target))


def _map_heads(run, q, k, v, visibility, *more):
    """Calls `run` for one head of one row at a time if they are large (see `HEAD_SCORES`)."""
    (rows, heads, length, _), keys = q.shape, k.shape[2]
    least = ORDERED_HEAD_SCORES if xla.is_ordered(visibility) else HEAD_SCORES
    small = length * keys < least or rows * heads * length * keys < ALL_SCORES
    if small or current_mesh() is not None:
        return run(q, k, v, visibility, *more)

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(rows * heads, 1, 1, *a.shape[2:])

    def of_each_head(a: jax.Array) -> jax.Array:
        return jnp.repeat(a, heads, axis=0)[:, None]

    inputs = split(q), split(k), split(v), jax.tree.map(of_each_head, visibility)
    out = jax.lax.map(lambda one: run(*one), (*inputs, *map(split, more)))
    return jax.tree.map(lambda a: a.reshape(rows, heads, *a.shape[3:]), out)


_FORM = xla.Form(_chunk, _map_heads, KEYS_FIRST)
