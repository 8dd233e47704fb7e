"""Grouped matrix products over chunks of pairs, for buffers that are mostly empty.

An expert exchange that drops no tokens needs a receive buffer for all tokens, of which a device
gets a fraction.  Here only the pairs of local experts are computed, in as many chunks as they fill.

Suffixes: T tokens, K experts per token, P = T * K (token, expert) pairs sorted by expert (those of
no expert last), C pairs of a chunk, G experts in the weights, D width, F expert width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl2jax.ops.experts.tpu_gmm import Products, silu_gate

CHUNKS = 2  # number of chunks if the load is balanced
SCOPE = "expert_chunks"  # name scope of the loops


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def chunked_sum(x_TD, weights_TK, order_P, sizes_G, w, chunk: int, used: int, interpret: bool):
    """Weighted sum of the experts of each token.

    Args:
      x_TD: tokens.
      weights_TK: float32, gate values of the chosen experts.
      order_P: int32, pairs `t * K + k` sorted by expert.
      sizes_G: int32, number of pairs of each expert; their sum may be less than P.
      w: `ExpertWeights`.
      chunk: C.
      used: number of experts that can have pairs; less than G if w has several layers.
      interpret: whether to interpret the kernels, which works without a TPU but is slow.

    Returns:
      [T, D] in the dtype of x.
    """
    loop = _Loop(order_P, sizes_G, weights_TK, chunk)

    def one(i, y_TD):
        part = loop.part(i)
        product = Products(x_TD.dtype, chunk, part.sizes, used, interpret)
        x_CD = x_TD[part.tokens]
        hidden = silu_gate(product.rows(x_CD, w.gate), product.rows(x_CD, w.up))
        y_CD = product.filled(product.rows(hidden, w.down)).astype(jnp.float32)
        return y_TD.at[part.tokens].add(y_CD * part.weights)

    return loop.run(one, jnp.zeros(x_TD.shape, jnp.float32)).astype(x_TD.dtype)


def _forward(x_TD, weights_TK, order_P, sizes_G, w, chunk, used, interpret):
    y_TD = chunked_sum(x_TD, weights_TK, order_P, sizes_G, w, chunk, used, interpret)
    return y_TD, (x_TD, weights_TK, order_P, sizes_G, w)


def _backward(chunk, used, interpret, residuals, g_TD):
    """Recomputes the hidden rows; the result of the down projection is not needed."""
    x_TD, weights_TK, order_P, sizes_G, w = residuals
    loop = _Loop(order_P, sizes_G, weights_TK, chunk)

    def one(i, carry):
        dx_TD, d_weights_P, dw = carry
        part = loop.part(i)
        product = Products(x_TD.dtype, chunk, part.sizes, used, interpret)
        x_CD, g_CD = x_TD[part.tokens], g_TD[part.tokens]
        gate, up = product.rows(x_CD, w.gate), product.rows(x_CD, w.up)
        hidden, hidden_vjp = jax.vjp(silu_gate, gate, up)
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
    """A chunk: its pairs and tokens int32[C], gate values float32[C, 1], pairs per expert [G]."""

    pairs: jax.Array
    tokens: jax.Array
    weights: jax.Array
    sizes: jax.Array


class _Loop:
    """A loop over the chunks that have pairs of an expert."""

    def __init__(self, order_P, sizes_G, weights_TK, chunk: int):
        self.order = jnp.pad(order_P, (0, -order_P.size % chunk))
        self.ends, self.begins = jnp.cumsum(sizes_G), jnp.cumsum(sizes_G) - sizes_G
        self.weights, self.top_k, self.chunk = weights_TK, weights_TK.shape[1], chunk

    def part(self, i: jax.Array) -> _Part:
        start = i * self.chunk
        pairs = jax.lax.dynamic_slice_in_dim(self.order, start, self.chunk)
        clipped = (jnp.clip(edge - start, 0, self.chunk) for edge in (self.ends, self.begins))
        ends, begins = clipped
        weights = self.weights.reshape(-1)[pairs].astype(jnp.float32)[:, None]
        return _Part(pairs, pairs // self.top_k, weights, ends - begins)

    def run(self, body, start):
        with jax.named_scope(SCOPE):
            return jax.lax.fori_loop(0, -(-self.ends[-1] // self.chunk), body, start)
