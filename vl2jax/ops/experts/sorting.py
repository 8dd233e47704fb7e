"""Tokens sorted by expert, and back: what is around a product over groups of rows.

Suffixes: T tokens, K experts per token, P = T * K pairs sorted by expert, E experts, D width,
F expert width.
"""

import functools

import jax
import jax.numpy as jnp


def by_expert(grouped, x_TD, weights_TK, experts_TK, n_experts: int) -> jax.Array:
    """`grouped` (rows by expert, group sizes -> rows) between sorting and the weighted sum."""
    flat_P, top_k = experts_TK.reshape(-1), experts_TK.shape[-1]
    order_P = jnp.argsort(flat_P, stable=True)
    inverse_P = jnp.zeros_like(order_P).at[order_P].set(jnp.arange(flat_P.size))
    group_sizes = jnp.bincount(flat_P, length=n_experts)
    y_PD = grouped(_spread(x_TD, order_P, inverse_P, top_k), group_sizes)
    y_TKD = _permute(y_PD, inverse_P, order_P).reshape(*experts_TK.shape, -1)
    weights_TK = weights_TK.astype(jnp.float32)
    return jnp.einsum("TK,TKD->TD", weights_TK, y_TKD.astype(jnp.float32)).astype(x_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_TD, order_P, inverse_P, top_k):
    """Row of token t for each of its pairs, sorted by expert; backward is a gather as well."""
    return x_TD[order_P // top_k]


def _spread_forward(x_TD, order_P, inverse_P, top_k):
    return _spread(x_TD, order_P, inverse_P, top_k), inverse_P


def _spread_backward(top_k, inverse_P, g_PD):
    g_TKD = g_PD[inverse_P].reshape(-1, top_k, g_PD.shape[-1])
    return g_TKD.astype(jnp.float32).sum(axis=1).astype(g_PD.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _permute(y_PD, order_P, inverse_P):
    return y_PD[order_P]


_permute.defvjp(
    lambda y_PD, order_P, inverse_P: (y_PD[order_P], inverse_P),
    lambda inverse_P, g_PD: (g_PD[inverse_P], None, None),
)
