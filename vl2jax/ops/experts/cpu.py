"""Routed experts on CPU for decoding steps with one or two tokens.

For so few tokens, sorting and a loop over experts take longer than the matrix products.  Here the
weights of the chosen experts are gathered, and all pairs are one batched matrix product.

Suffixes as in `xla.py`.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul import Weight, einsum
from vl2jax.parallel.mesh import current_mesh


def refuses(x_TD, weights_TK, experts_TK, w, first=0, n_experts=None) -> str:
    """Supports a single device and few (token, expert) pairs, each of which gathers an expert."""
    if current_mesh() is not None:
        return "on a mesh"
    few_pairs = 3 * experts_TK.size < (n_experts or w.gate.shape[0])
    return "" if few_pairs else "more than a third as many pairs as experts"


def few(x_TD, weights_TK, experts_TK, w, first=0, n_experts=None) -> jax.Array:
    """Gathers an expert's weights for each (token, expert) pair and computes all pairs at once.

    Same arguments and result as `ops.experts.routed_experts`.
    """
    del n_experts
    tokens, top_k = experts_TK.shape
    index_P = experts_TK.reshape(-1) + first
    gate, up, down = (jax.tree.map(lambda a: _copies(a, index_P), stack) for stack in w)
    x_P1D = jnp.repeat(x_TD, top_k, axis=0)[:, None]
    hidden = jax.nn.silu(_product(x_P1D, gate)) * _product(x_P1D, up)
    y_P1D = _product(hidden.astype(x_TD.dtype), down).astype(x_TD.dtype)
    y_TKD = y_P1D.reshape(tokens, top_k, -1).astype(jnp.float32)
    weights_TK = weights_TK.astype(jnp.float32)
    return jnp.einsum("TK,TKD->TD", weights_TK, y_TKD).astype(x_TD.dtype)


def _product(x_P1D: jax.Array, w_PDF: Weight) -> jax.Array:
    """Batched product, float32[P, 1, F]; a row of zeros is added as in `ops.matmul.cpu`."""
    if x_P1D.dtype == jnp.bfloat16:
        x_P1D = jnp.pad(x_P1D, ((0, 0), (0, 1), (0, 0)))
    return einsum("PMD,PDF->PMF", x_P1D, w_PDF)[:, :1]


def _copies(stack: jax.Array, index: jax.Array) -> jax.Array:
    """`stack[index]`, bfloat16 as bits: XLA's CPU compiler would convert it to float32 and back."""
    if stack.dtype != jnp.bfloat16:
        return stack.at[index].get(mode="promise_in_bounds")
    bits = jax.lax.bitcast_convert_type(stack, jnp.uint16)
    bits = bits.at[index].get(mode="promise_in_bounds")
    return jax.lax.bitcast_convert_type(bits, stack.dtype)
