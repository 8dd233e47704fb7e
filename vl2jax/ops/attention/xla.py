"""The softmax of attention: masks from positions and segments, queries in chunks.

Axis legend: B rows, T queries, S keys, H heads (1 in k and v: shared), K query width,
V value width.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vl2jax.model.layers import PRODUCT, product
from vl2jax.ops.attention.tpu import serves, splash
from vl2jax.ops.platform import on_cpu, on_tpu
from vl2jax.parallel.mesh import current_mesh

# Queries per step. On CPU the scores of a step should stay in the cache; elsewhere a step should
# be large.
CPU_SCORES = 1 << 21
QUERY_CHUNK, WHOLE = 256, 1024
# Scores of one head, and of all, from which on a CPU is faster with one head after the other; of
# ordered sequences it must be more, for they are cut into small products already.
SCORES_APART, ORDERED_APART, ALL_APART = 1 << 19, 1 << 22, 1 << 23
# Numbers of queries for which a CPU multiplies faster with the keys as the rows of the product.
FEW = range(4, 65)
# Most extents of keys among the steps of an ordered sequence: each is code of its own, and with
# eight of them 1/16 of the scores is computed in vain, of one half.
EXTENTS = 8


@flax.struct.dataclass
class Visibility:
    """Who sees whom: a query sees the keys of its own segment that are not later than itself.

    Attributes:
      q_positions, q_segments: int32[B, T].
      k_positions, k_segments: int32[B, S]. Segment 0 is padding, which nobody sees.
      ordered: whether query i and key i are the same token and no query sees a later key: then
        whole chunks of those are not even looked at.
    """

    q_positions: jax.Array
    q_segments: jax.Array
    k_positions: jax.Array
    k_segments: jax.Array
    ordered: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self) -> jax.Array:
        """bool[B, T, S], True where the query sees the key."""
        causal = self.k_positions[:, None, :] <= self.q_positions[:, :, None]
        same = self.k_segments[:, None, :] == self.q_segments[:, :, None]
        return causal & same & (self.k_segments > 0)[:, None, :]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None = None
) -> jax.Array:
    """`softmax(q k^T scale) v`, softmax in float32.

    A query that sees no key (padding) gets the mean of all values that are looked at.  The
    backward pass computes the scores again, so that nothing of size [T, S] outlives a step.

    Args:
      q: [B, T, H, K].
      k: [B, S, H or 1, K].
      v: [B, S, H or 1, V].
      scale: multiplies the scores.
      visibility: None: every query sees every key.

    Returns:
      [B, T, H, V] in the dtype of v.
    """
    rows, length, heads, _ = q.shape
    if on_tpu() and serves(q, k):
        return splash(q, k, v, scale, None if visibility is None else visibility.q_segments)
    if k.shape[2] == 1 < heads:  # heads that share keys and values are more queries of one head
        q = q.reshape(rows, length * heads, 1, -1)
        if visibility is not None:
            repeated = (visibility.q_positions, visibility.q_segments)
            positions, segments = (jnp.repeat(a, heads, axis=1) for a in repeated)
            visibility = visibility.replace(
                q_positions=positions, q_segments=segments, ordered=False
            )
    elif length == 1 and on_cpu() and current_mesh() is None:
        return _attend_one(q, k, v, visibility, scale)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    y = _attend(q, k, v, visibility, scale).swapaxes(1, 2)
    return y.reshape(rows, length, heads, -1)


def _attend_one(q, k, v, visibility, scale) -> jax.Array:
    """One query per row, heads as rows: along two axes of heads and rows XLA's CPU compiler makes
    such a product float32, and a single query of bfloat16 wants company (see `layers.matmul`)."""
    rows, length, heads, _ = q.shape
    if q.dtype == jnp.bfloat16:
        length = 2
        q = jnp.pad(q, ((0, 0), (0, 1), (0, 0), (0, 0)))
    if visibility is not None:
        visibility = jax.tree.map(lambda a: jnp.repeat(a, heads, axis=0), visibility)
        repeated = (visibility.q_positions, visibility.q_segments)
        positions, segments = (jnp.repeat(a, length, axis=1) for a in repeated)
        visibility = visibility.replace(q_positions=positions, q_segments=segments, ordered=False)
    q, k, v = (a.swapaxes(1, 2).reshape(rows * heads, 1, a.shape[1], -1) for a in (q, k, v))
    y = _attend(q, k, v, visibility, scale)[:, :, :1]
    return y.reshape(rows, heads, 1, -1).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, visibility, scale):
    """[B, H, T, K], [B, H, S, K], [B, H, S, V] -> [B, H, T, V]."""
    return _attend_forward(q, k, v, visibility, scale)[0]


def _attend_forward(q, k, v, visibility, scale):
    def run(chunk_of, q, k, v, visibility):
        chunk = chunk_of(q, k, _ordered(visibility))

        def part(rows, k, v, visibility):
            def step(rows):
                q, seen = rows
                scores = _scores(q, k, scale, visibility, seen)
                highest = jnp.max(scores, axis=-1, keepdims=True)
                weights = jnp.exp(scores - highest)
                norm = 1 / jnp.sum(weights, axis=-1, keepdims=True)
                y = product("BHTS,BHSV->BHTV", weights.astype(v.dtype), v) * norm
                return y.astype(v.dtype), highest, norm

            return _chunked(step, rows, chunk)

        rows, out = (q, _queries(visibility)), []
        for queries, keys in _extents(q.shape[2], chunk, visibility):
            out.append(part(_cut(rows, queries), *_cut((k, v), keys), _first(visibility, keys)))
        return jax.tree.map(lambda *a: jnp.concatenate(a, axis=2), *out)

    out = _as_suits(run, q, k, v, visibility)
    y, highest, norm = (checkpoint_name(a, PRODUCT) for a in out)
    return y, (q, k, v, visibility, y, highest, norm)


def _attend_backward(scale, residuals, g):
    def run(chunk_of, q, k, v, visibility, *saved):
        chunk = chunk_of(q, k, _ordered(visibility))

        def part(carry, rows, k, v, visibility):
            def step(carry, rows):
                q, seen, y, highest, norm, g = rows
                scores = _scores(q, k, scale, visibility, seen)
                weights = jnp.exp(scores - highest) * norm  # 0 where the chunk is padded
                d_weights = product("BHTV,BHSV->BHTS", g, v)
                shift = jnp.sum(
                    g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True
                )
                d_scores = (weights * (d_weights - shift) * scale).astype(q.dtype)
                d_q = product("BHTS,BHSK->BHTK", d_scores, k).astype(q.dtype)
                d_k = carry[0] + product("BHTS,BHTK->BHSK", d_scores, q)
                d_v = carry[1] + product("BHTS,BHTV->BHSV", weights.astype(v.dtype), g)
                return (d_k, d_v), d_q

            return _chunked_scan(step, carry, rows, chunk)

        sums = tuple(jnp.zeros(a.shape, jnp.float32) for a in (k, v))
        rows, d_q = (q, _queries(visibility), *saved), []
        for queries, keys in _extents(q.shape[2], chunk, visibility):
            inputs = (_cut(rows, queries), *_cut((k, v), keys), _first(visibility, keys))
            some, of_part = part(_cut(sums, keys), *inputs)
            sums = tuple(a.at[:, :, keys].set(b) for a, b in zip(sums, some, strict=True))
            d_q.append(of_part)
        d_k, d_v = sums
        return jnp.concatenate(d_q, axis=2), d_k.astype(k.dtype), d_v.astype(v.dtype)

    q, k, v, visibility, *saved = residuals
    gradients = _as_suits(run, q, k, v, visibility, *saved, g.astype(v.dtype))
    return *gradients, None


_attend.defvjp(_attend_forward, _attend_backward)


def _ordered(visibility: Visibility | None) -> bool:
    return visibility is not None and visibility.ordered


def _extents(length: int, chunk: int, visibility: Visibility | None) -> list[tuple[slice, slice]]:
    """Queries and the keys that any of them may see; whole chunks, in order."""
    if not _ordered(visibility) or chunk >= length:
        return [(slice(0, length), slice(None))]
    chunks = -(-length // chunk)
    step = chunk * -(-chunks // EXTENTS)
    ends = [min(start + step, length) for start in range(0, length, step)]
    return [(slice(start, end), slice(end)) for start, end in zip([0, *ends], ends, strict=False)]


def _cut(tree, part: slice):
    """A part of axis 2 of all leaves."""
    return jax.tree.map(lambda a: a[:, :, part], tree)


def _first(visibility: Visibility | None, keys: slice) -> Visibility | None:
    """The same queries, only the first keys."""
    if visibility is None:
        return None
    return visibility.replace(
        k_positions=visibility.k_positions[:, keys], k_segments=visibility.k_segments[:, keys]
    )


def _queries(visibility: Visibility | None):
    """Positions and segments of the queries, with axes that match those of q."""
    if visibility is None:
        return None
    return tuple(a[:, None, :, None] for a in (visibility.q_positions, visibility.q_segments))


def _scores(q, k, scale, visibility, seen) -> jax.Array:
    """float32[B, H, T, S], masked."""
    if q.shape[2] in FEW and on_cpu():
        scores = product("BHSK,BHTK->BHST", k, q).swapaxes(2, 3) * scale
    else:
        scores = product("BHTK,BHSK->BHTS", q, k) * scale
    if visibility is None:
        return scores
    positions, segments = (a[:, 0, :, 0] for a in seen)
    mask = visibility.replace(q_positions=positions, q_segments=segments).mask()
    # Added, not replaced: the same numbers, and the original's gradients at padding too.
    return scores + jnp.where(mask, 0, jnp.finfo(jnp.float32).min)[:, None]


def _cpu_chunk(q: jax.Array, k: jax.Array, ordered: bool) -> int:
    length, per_query = q.shape[2], math.prod(k.shape[:3])
    target = max(CPU_SCORES // per_query, 64)
    if ordered:  # `EXTENTS` steps: many scores are saved, products stay thick
        most = max(4 * CPU_SCORES // per_query, 64)
        target = min(max(length // EXTENTS, 64), 256, most)
    return -(-length // -(-length // target))


def _heads_apart(run, q, k, v, visibility, *more):
    """`run` on one head of one row after the other, where these are large (see `SCORES_APART`)."""
    (rows, heads, length, _), keys = q.shape, k.shape[2]
    least = ORDERED_APART if _ordered(visibility) else SCORES_APART
    small = length * keys < least or rows * heads * length * keys < ALL_APART
    if small or current_mesh() is not None:
        return run(q, k, v, visibility, *more)

    def apart(a: jax.Array) -> jax.Array:
        return a.reshape(rows * heads, 1, 1, *a.shape[2:])

    def of_each_head(a: jax.Array) -> jax.Array:
        return jnp.repeat(a, heads, axis=0)[:, None]

    inputs = apart(q), apart(k), apart(v), jax.tree.map(of_each_head, visibility)
    out = jax.lax.map(lambda one: run(*one), (*inputs, *map(apart, more)))
    return jax.tree.map(lambda a: a.reshape(rows, heads, *a.shape[3:]), out)


def _default_chunk(q: jax.Array, k: jax.Array, ordered: bool) -> int:
    del k, ordered
    return q.shape[2] if q.shape[2] <= WHOLE else QUERY_CHUNK


def _as_suits(run, *arguments):
    """`run` in the form, and with the chunk size, that suit the platform."""
    if on_cpu():
        return _heads_apart(functools.partial(run, _cpu_chunk), *arguments)
    return run(_default_chunk, *arguments)


def _chunked(step, rows, chunk: int):
    """`step` on chunks of axis 2 of all leaves of `rows`, results joined along it."""
    return _chunked_scan(lambda carry, rows: (carry, step(rows)), (), rows, chunk)[1]


def _chunked_scan(step, carry, rows, chunk: int):
    """`jax.lax.scan` over chunks of axis 2; the last one is padded with zeros."""
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
