"""Routed experts for the few tokens of a decoding step, on CPU.

Suffixes as in `experts.py`.  A loop over experts would copy their weights out of the stack one by
one and multiply a row or two with each, on one core.  Here all is one product of many matrices.
"""

import jax
import jax.numpy as jnp

MOST_TOKENS = 16  # from more on, rows of zeros cost more than a loop over the experts


def serves(tokens: int, top_k: int, n_experts: int) -> bool:
    """Whether `few` is the right form: few tokens, which use many of the experts or very few."""
    return tokens <= MOST_TOKENS and (
        _gathers(tokens, top_k, n_experts) or 4 * tokens * top_k >= n_experts
    )


def _gathers(tokens: int, top_k: int, n_experts: int) -> bool:
    """Whether copies of the chosen experts are less work than products with all of them.

    A copy is read, written and read again.
    """
    return 3 * tokens * top_k < n_experts


def few(x_TD, weights_TK, experts_TK, w, first=0, n_experts=None) -> jax.Array:
    """Every expert on every token; where these are very few, copies of the chosen experts.

    Exact, nothing dropped.  Args and result as of `experts.blocked`.
    """
    n_experts = n_experts or w.gate.shape[0]
    weights_TK = weights_TK.astype(jnp.float32)
    if _gathers(*experts_TK.shape, n_experts):
        return _chosen(x_TD, weights_TK, experts_TK + first, w)
    if w.gate.shape[0] != n_experts:
        w = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, n_experts), w)
    return _all(x_TD, weights_TK, experts_TK, w)


def _all(x_TD, weights_TK, experts_TK, w) -> jax.Array:
    n_experts = w.gate.shape[0]
    chosen_TKE = jax.nn.one_hot(experts_TK, n_experts, dtype=jnp.float32)
    weights_ET = jnp.einsum("TK,TKE->ET", weights_TK, chosen_TKE)
    x_ETD = jnp.broadcast_to(x_TD, (n_experts, *x_TD.shape))
    y_ETD = _ffn(x_ETD, *w)
    return jnp.sum(weights_ET[..., None] * y_ETD.astype(jnp.float32), axis=0).astype(x_TD.dtype)


def _chosen(x_TD, weights_TK, experts_TK, w) -> jax.Array:
    """One pair of token and expert after the other, each with a copy of its expert."""
    tokens, top_k = experts_TK.shape
    copies = [_rows(stack, experts_TK.reshape(-1)) for stack in w]
    x_P1D = jnp.repeat(x_TD, top_k, axis=0)[:, None]
    y_TKD = _ffn(x_P1D, *copies).reshape(tokens, top_k, -1)
    return jnp.einsum("TK,TKD->TD", weights_TK, y_TKD.astype(jnp.float32)).astype(x_TD.dtype)


def _ffn(x_EMD, gate_EDF, up_EDF, down_EFD) -> jax.Array:
    """Expert e on the rows of e: [E, M, D] in the dtype of x."""
    gate, up = _product(x_EMD, gate_EDF), _product(x_EMD, up_EDF)
    hidden = (jax.nn.silu(gate) * up).astype(x_EMD.dtype)
    return _product(hidden, down_EFD).astype(x_EMD.dtype)


def _product(x_EMD, w_EDF) -> jax.Array:
    """float32[E, M, F]; a single bfloat16 row gets company, as in `layers.matmul`."""
    rows, w_EDF = x_EMD.shape[1], w_EDF.astype(x_EMD.dtype)
    if rows == 1 and x_EMD.dtype == jnp.bfloat16:
        x_EMD = jnp.pad(x_EMD, ((0, 0), (0, 1), (0, 0)))
    y = jnp.einsum("EMD,EDF->EMF", x_EMD, w_EDF, preferred_element_type=jnp.float32)
    return y[:, :rows]


def _rows(stack: jax.Array, index: jax.Array) -> jax.Array:
    """`stack[index]`; bfloat16 as its bits, for XLA's CPU compiler would widen it on the way."""
    if stack.dtype != jnp.bfloat16:
        return stack.at[index].get(mode="promise_in_bounds")
    bits = jax.lax.bitcast_convert_type(stack, jnp.uint16)
    bits = bits.at[index].get(mode="promise_in_bounds")
    return jax.lax.bitcast_convert_type(bits, stack.dtype)
