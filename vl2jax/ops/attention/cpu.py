"""Attention on CPU: `xla.py` with chunks whose scores fit into the CPU's caches.

Axis legend: B rows, T queries, S keys, H heads, K query width, V value width.
"""

import math

import jax

from vl2jax.ops.attention import xla
from vl2jax.ops.attention.visibility import Visibility

SCORES = 1 << 21  # scores per chunk


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None
) -> jax.Array:
    """Same arguments and result as `ops.attention.attention`."""
    return xla.attention(q, k, v, scale, visibility, chunk_size)


def chunk_size(q: jax.Array, k: jax.Array, ordered: bool) -> int:
    """Queries per chunk, see `xla.ChunkSize`."""
    length, per_query = q.shape[2], math.prod(k.shape[:3])
    target = max(SCORES // per_query, 64)
    if ordered:  # `EXTENTS` parts skip many scores and keep the products large
        most = max(4 * SCORES // per_query, 64)
        target = min(max(length // xla.EXTENTS, 64), 256, most)
    return -(-length // -(-length // target))
