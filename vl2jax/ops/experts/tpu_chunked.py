"""The grouped products over chunks of pairs: for buffers that have room for far more than comes.

Where tokens are exchanged without dropping any, a device must have room for all of them, and gets
a fraction. Here only what has come is worked off, in as many chunks as it takes.

Suffixes: T tokens, K experts per token, P = T * K pairs sorted by expert (those of no expert last),
C pairs of a chunk, G experts in the weights, D width, F expert width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl2jax.ops.experts.tpu_gmm import Products, hidden_rows

CHUNKS = 2  # that balanced experts take
SCOPE = "expert_chunks"  # in the names of the loops


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def chunked_sum(x_TD, weights_TK, order_P, sizes_G, w, chunk: int, used: int, interpret: bool):
    """Weighted sum [T, D] of the experts of each token.

    Args:
      x_TD: tokens.
      weights_TK: float32.
      order_P: int32, pairs `t * K + k` sorted by expert.
      sizes_G: int32, pairs of each expert; their sum may be less than P.
      w: `ExpertWeights`.
      chunk: C.
      used: how many of the experts may have pairs (the weights may be those of many layers).
      interpret: runs the kernels without a TPU, slowly.
    """
    loop = _Loop(order_P, sizes_G, weights_TK, chunk)

    def one(i, y_TD):
        part = loop.part(i)
        product = Products(x_TD.dtype, chunk, part.sizes, used, interpret)
        x_CD = x_TD[part.tokens]
        hidden = hidden_rows(product.rows(x_CD, w.gate), product.rows(x_CD, w.up))
        y_CD = product.filled(product.rows(hidden, w.down)).astype(jnp.float32)
        return y_TD.at[part.tokens].add(y_CD * part.weights)

    return loop.run(one, jnp.zeros(x_TD.shape, jnp.float32)).astype(x_TD.dtype)


def _forward(x_TD, weights_TK, order_P, sizes_G, w, chunk, used, interpret):
    y_TD = chunked_sum(x_TD, weights_TK, order_P, sizes_G, w, chunk, used, interpret)
    return y_TD, (x_TD, weights_TK, order_P, sizes_G, w)


def _backward(chunk, used, interpret, residuals, g_TD):
    """Hidden rows are computed again; the result of the down product is not needed."""
    x_TD, weights_TK, order_P, sizes_G, w = residuals
    loop = _Loop(order_P, sizes_G, weights_TK, chunk)

    def one(i, carry):
        dx_TD, d_weights_P, dw = carry
        part = loop.part(i)
        product = Products(x_TD.dtype, chunk, part.sizes, used, interpret)
        x_CD, g_CD = x_TD[part.tokens], g_TD[part.tokens]
        gate, up = product.rows(x_CD, w.gate), product.rows(x_CD, w.up)
        hidden, hidden_vjp = jax.vjp(hidden_rows, gate, up)
        d_hidden = product.rows(g_CD, w.down, transpose=True).astype(jnp.float32)
        d_weight = jnp.sum(d_hidden * hidden.astype(jnp.float32), axis=-1, keepdims=True)
        d_gate, d_up = hidden_vjp((d_hidden * part.weights).astype(hidden.dtype))
        of_gate = product.rows(d_gate, w.gate, transpose=True).astype(jnp.float32)
        dx_CD = of_gate + product.rows(d_up, w.up, transpose=True).astype(jnp.float32)
        scaled = (hidden.astype(jnp.float32) * part.weights).astype(hidden.dtype)
        new = (
            product.weights(x_CD, d_gate),
            product.weights(x_CD, d_up),
            product.weights(scaled, g_CD),
        )
        dx_TD = dx_TD.at[part.tokens].add(product.filled(dx_CD))
        d_weights_P = d_weights_P.at[part.pairs].add(product.filled(d_weight)[:, 0])
        return dx_TD, d_weights_P, tuple(map(jnp.add, dw, new))

    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    start = zeros(x_TD.shape), zeros(weights_TK.size), tuple(zeros(a.shape) for a in w)
    dx_TD, d_weights_P, dw = loop.run(one, start)
    dw = type(w)(*(new.astype(old.dtype) for new, old in zip(dw, w, strict=True)))
    d_weights_TK = d_weights_P.reshape(weights_TK.shape).astype(weights_TK.dtype)
    return dx_TD.astype(x_TD.dtype), d_weights_TK, None, None, dw


chunked_sum.defvjp(_forward, _backward)


class _Part(NamedTuple):
    """A chunk: its pairs and tokens int32[C], weights float32[C, 1], and rows per expert [G]."""

    pairs: jax.Array
    tokens: jax.Array
    weights: jax.Array
    sizes: jax.Array


class _Loop:
    """As many chunks as it takes for the pairs that there are."""

    def __init__(self, order_P, sizes_G, weights_TK, chunk: int):
        self.order = jnp.pad(order_P, (0, -order_P.size % chunk))
        self.ends, self.begins = jnp.cumsum(sizes_G), jnp.cumsum(sizes_G) - sizes_G
        self.weights, self.top_k, self.chunk = weights_TK, weights_TK.shape[1], chunk

    def part(self, i: jax.Array) -> _Part:
        start = i * self.chunk
        pairs = jax.lax.dynamic_slice_in_dim(self.order, start, self.chunk)
        inside = (jnp.clip(edge - start, 0, self.chunk) for edge in (self.ends, self.begins))
        ends, begins = inside
        weights = self.weights.reshape(-1)[pairs].astype(jnp.float32)[:, None]
        return _Part(pairs, pairs // self.top_k, weights, ends - begins)

    def run(self, body, start):
        with jax.named_scope(SCOPE):
            return jax.lax.fori_loop(0, -(-self.ends[-1] // self.chunk), body, start)
