"""Reference implementation of attention: the equation itself, all scores at once, in float32.

Axis legend: B rows, T queries, S keys, H heads, K query width, V value width.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.attention.visibility import Visibility


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None
) -> jax.Array:
    """Same arguments and result as `ops.attention.attention`."""
    heads, highest = q.shape[2], jax.lax.Precision.HIGHEST
    q, k, v_heads = (a.astype(jnp.float32) for a in (q, k, v))
    k, v_heads = (jnp.broadcast_to(a, (*a.shape[:2], heads, a.shape[-1])) for a in (k, v_heads))
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k, precision=highest) * scale
    if visibility is not None:
        lowest = jnp.finfo(jnp.float32).min
        scores += jnp.where(visibility.mask(), 0, lowest)[:, None]
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("BHTS,BSHV->BTHV", weights, v_heads, precision=highest).astype(v.dtype)
