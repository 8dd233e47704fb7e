"""Attention without a kernel: XLA compiles it, and queries are processed in chunks.

As in flash attention, the backward pass recomputes the scores chunk by chunk instead of keeping
them.  Of a sequence with several chunks, only the scores of one chunk are in memory at a time.

Axis legend: B rows, T queries, S keys, H heads (1 in k and v: shared), K query width,
V value width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vl2jax.ops.attention.visibility import Visibility
from vl2jax.ops.matmul import product
from vl2jax.ops.names import PRODUCT

# Sequences of up to `WHOLE` queries are one chunk; longer ones have chunks of `QUERY_CHUNK`.
QUERY_CHUNK, WHOLE = 256, 1024
# An ordered sequence is split into up to `EXTENTS` parts.  Each part attends only to the keys up to
# its end, and is compiled separately.  With eight parts, 1/16 of all scores is computed in spite of
# the mask; with one part, it is 1/2.
EXTENTS = 8


# (q [B, H, T, K], k [B, H, S, K], ordered) -> queries per chunk.
ChunkSize = Callable[[jax.Array, jax.Array, bool], int]


def default_chunk_size(q: jax.Array, k: jax.Array, ordered: bool) -> int:
    """One chunk for up to `WHOLE` queries, else chunks of `QUERY_CHUNK`."""
    del k, ordered
    return q.shape[2] if q.shape[2] <= WHOLE else QUERY_CHUNK


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    visibility: Visibility | None,
    chunk_size: ChunkSize = default_chunk_size,
) -> jax.Array:
    """Same arguments and result as `ops.attention.attention`; `chunk_size` splits the queries.

    A query that sees no key gets the mean of the values of all keys that are read for it.
    """
    rows, length, heads, _ = q.shape
    if k.shape[2] == 1 < heads:  # heads that share keys and values become queries of one head
        q = q.reshape(rows, length * heads, 1, -1)
        if visibility is not None:
            visibility = visibility.repeat_queries(heads)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    y: Any = _by_heads(q, k, v, visibility, scale, chunk_size)
    return y.swapaxes(1, 2).reshape(rows, length, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_heads(q, k, v, visibility, scale, chunk_size) -> Any:
    """Attention with heads before tokens: q [B, H, T, K], k, v [B, H, S, .] -> [B, H, T, V]."""
    return _forward(q, k, v, visibility, scale, chunk_size)[0]


def _forward(q, k, v, visibility, scale, chunk_size):
    chunk = chunk_size(q, k, _is_ordered(visibility))

    def part(rows, k, v, visibility):
        def step(rows):
            q, query_ids = rows
            scores = _scores(q, k, scale, visibility, query_ids)
            highest = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            norm = 1 / jnp.sum(weights, axis=-1, keepdims=True)
            y = product("BHTS,BHSV->BHTV", weights.astype(v.dtype), v) * norm
            return y.astype(v.dtype), highest, norm

        return _chunked(step, rows, chunk)

    rows, out = (q, _queries(visibility)), []
    for queries, keys in _extents(q.shape[2], chunk, visibility):
        some_k, some_v = _cut((k, v), keys)
        out.append(part(_cut(rows, queries), some_k, some_v, _first(visibility, keys)))
    out = jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), *out)
    y, highest, norm = (checkpoint_name(a, PRODUCT) for a in out)
    return y, (q, k, v, visibility, y, highest, norm)


def _backward(scale, chunk_size, residuals, g):
    q, k, v, visibility, *saved = residuals
    chunk = chunk_size(q, k, _is_ordered(visibility))

    def part(carry, rows, k, v, visibility):
        def step(carry, rows):
            q, query_ids, y, highest, norm, g = rows
            scores = _scores(q, k, scale, visibility, query_ids)
            weights = jnp.exp(scores - highest) * norm  # 0 for padding queries: norm is 0
            d_weights = product("BHTV,BHSV->BHTS", g, v)
            shift = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
            d_scores = (weights * (d_weights - shift) * scale).astype(q.dtype)
            d_q = product("BHTS,BHSK->BHTK", d_scores, k).astype(q.dtype)
            d_k = carry[0] + product("BHTS,BHTK->BHSK", d_scores, q)
            d_v = carry[1] + product("BHTS,BHTV->BHSV", weights.astype(v.dtype), g)
            return (d_k, d_v), d_q

        return _chunked_scan(step, carry, rows, chunk)

    sums = tuple(jnp.zeros(a.shape, jnp.float32) for a in (k, v))
    rows, d_q = (q, _queries(visibility), *saved, g.astype(v.dtype)), []
    for queries, keys in _extents(q.shape[2], chunk, visibility):
        some_k, some_v = _cut((k, v), keys)
        some_rows, some_visibility = _cut(rows, queries), _first(visibility, keys)
        some, of_part = part(_cut(sums, keys), some_rows, some_k, some_v, some_visibility)
        sums = tuple(a.at[:, :, keys].set(b) for a, b in zip(sums, some, strict=True))
        d_q.append(of_part)
    d_k, d_v = sums
    return jnp.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_by_heads.defvjp(_forward, _backward)


def _is_ordered(visibility: Visibility | None) -> bool:
    """Whether keys above the diagonal may be skipped, see `Visibility.ordered`."""
    return visibility is not None and visibility.ordered


def _extents(length: int, chunk: int, visibility: Visibility | None) -> list[tuple[slice, slice]]:
    """Splits the queries into parts of whole chunks, each with the keys that it may see."""
    if not _is_ordered(visibility) or chunk >= length:
        return [(slice(0, length), slice(None))]
    chunks = -(-length // chunk)
    step = chunk * -(-chunks // EXTENTS)
    ends = [min(start + step, length) for start in range(0, length, step)]
    return [(slice(start, end), slice(end)) for start, end in zip([0, *ends], ends, strict=False)]


def _cut(tree, part: slice):
    """Slices axis 2 of all leaves."""
    return jax.tree.map(lambda a: a[:, :, part], tree)


def _first(visibility: Visibility | None, keys: slice) -> Visibility | None:
    """Restricts a mask to some of the keys."""
    if visibility is None:
        return None
    return dataclasses.replace(
        visibility,
        k_positions=visibility.k_positions[:, keys],
        k_segments=visibility.k_segments[:, keys],
    )


def _queries(visibility: Visibility | None):
    """Positions and segments of the queries, with the four axes of q, to be chunked with it."""
    if visibility is None:
        return None
    return tuple(a[:, None, :, None] for a in (visibility.q_positions, visibility.q_segments))


def _scores(q, k, scale, visibility, query_ids) -> jax.Array:
    """Masked scores of a chunk: float32[B, H, T, S]."""
    scores = product("BHTK,BHSK->BHTS", q, k) * scale
    if visibility is None:
        return scores
    positions, segments = (a[:, 0, :, 0] for a in query_ids)
    mask = dataclasses.replace(visibility, q_positions=positions, q_segments=segments).mask()
    # The original adds its mask as well.  Overwriting scores would give the same outputs, but other
    # gradients at padding.
    return scores + jnp.where(mask, 0, jnp.finfo(jnp.float32).min)[:, None]


def _chunked(step, rows, chunk: int):
    """Maps `step` over chunks of axis 2 of all leaves of `rows`; joins the results along it."""
    return _chunked_scan(lambda carry, rows: (carry, step(rows)), (), rows, chunk)[1]


def _chunked_scan(step, carry, rows, chunk: int):
    """`jax.lax.scan` over chunks of axis 2 of all leaves; the last chunk is padded with zeros."""
    length = jax.tree.leaves(rows)[0].shape[2]
    if chunk >= length:
        return step(carry, rows)
    chunks = -(-length // chunk)

    def split(x: jax.Array) -> jax.Array:
        pad = ((0, 0), (0, 0), (0, chunks * chunk - length), (0, 0))
        return jnp.moveaxis(jnp.pad(x, pad).reshape(*x.shape[:2], chunks, chunk, -1), 2, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], chunks * chunk, -1)[:, :, :length]

    carry, out = jax.lax.scan(step, carry, jax.tree.map(split, rows))
    return carry, jax.tree.map(join, out)
