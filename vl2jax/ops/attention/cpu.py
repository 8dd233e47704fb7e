"""Attention on CPU: `xla.py` with steps whose scores stay in the cache.

Axis legend: B rows, T queries, S keys, H heads, K query width, V value width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from vl2jax.ops.attention import xla
from vl2jax.ops.attention.visibility import Visibility
from vl2jax.parallel.mesh import current_mesh

SCORES = 1 << 21  # of a step
# Scores of one head, and of all, from which on one head after the other is faster; of ordered
# sequences it must be more, for they are cut into small products already.
HEAD_SCORES, ORDERED_HEAD_SCORES, ALL_SCORES = 1 << 19, 1 << 22, 1 << 23
KEYS_FIRST = range(4, 65)  # numbers of queries for which the keys are better the product's rows


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None
) -> jax.Array:
    """As `ops.attention.attention`."""
    one_query = q.shape[1] == 1 and k.shape[2] == q.shape[2] and current_mesh() is None
    if one_query:
        return _one_query(q, k, v, scale, visibility)
    return xla.attention(q, k, v, scale, visibility, _FORM)


def _one_query(q, k, v, scale, visibility) -> jax.Array:
    """One query per row, heads as rows: along two axes of heads and rows XLA's CPU compiler makes
    such a product float32, and a single query of bfloat16 wants company (see `ops.matmul.cpu`)."""
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
    if ordered:  # `EXTENTS` steps: many scores are saved, products stay thick
        most = max(4 * SCORES // per_query, 64)
        target = min(max(length // xla.EXTENTS, 64), 256, most)
    return -(-length // -(-length // target))


def _map_heads(run, q, k, v, visibility, *more):
    """`run` on one head of one row after the other, where these are large (see `HEAD_SCORES`)."""
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
