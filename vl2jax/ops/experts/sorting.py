"""Sorts tokens by expert before a grouped computation, and combines its results after it.

Suffixes: T tokens, K experts per token, P = T * K (token, expert) pairs sorted by expert,
E experts, D width, F expert width.
"""

import functools

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul import product


def sorted_by_expert(grouped, x_TD, weights_TK, experts_TK, n_experts: int) -> jax.Array:
    """Sorts tokens by expert, applies `grouped`, and sums its results per token.

    Args:
      grouped: (rows [P, D] sorted by expert, group sizes int32[E]) -> rows [P, D].
      x_TD: tokens.
      weights_TK: gate values of the chosen experts.
      experts_TK: int32, ids of the chosen experts.
      n_experts: E.

    Returns:
      [T, D] in the dtype of x, summed in float32.
    """
    flat_P, top_k = experts_TK.reshape(-1), experts_TK.shape[-1]
    order_P = jnp.argsort(flat_P, stable=True)
    inverse_P = jnp.zeros_like(order_P).at[order_P].set(jnp.arange(flat_P.size))
    group_sizes = jnp.bincount(flat_P, length=n_experts)
    y_PD = grouped(_dispatch(x_TD, order_P, inverse_P, top_k), group_sizes)
    y_TKD = _permute(y_PD, inverse_P, order_P).reshape(*experts_TK.shape, -1)
    weights_TK = weights_TK.astype(jnp.float32)
    return product("TK,TKD->TD", weights_TK, y_TKD.astype(jnp.float32)).astype(x_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x_TD, order_P, inverse_P, top_k):
    """Copies each token's row to its K pairs, sorted by expert; the gradient is a gather too."""
    return x_TD[order_P // top_k]


def _dispatch_forward(x_TD, order_P, inverse_P, top_k):
    return _dispatch(x_TD, order_P, inverse_P, top_k), inverse_P


def _dispatch_backward(top_k, inverse_P, g_PD):
    g_TKD = g_PD[inverse_P].reshape(-1, top_k, g_PD.shape[-1])
    return g_TKD.astype(jnp.float32).sum(axis=1).astype(g_PD.dtype), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _permute(y_PD, order_P, inverse_P):
    """Reorders rows; the gradient is a gather by the inverse permutation."""
    return y_PD[order_P]


_permute.defvjp(
    lambda y_PD, order_P, inverse_P: (y_PD[order_P], inverse_P),
    lambda inverse_P, g_PD: (g_PD[inverse_P], None, None),
)
