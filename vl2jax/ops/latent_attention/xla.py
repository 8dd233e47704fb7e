"""Absorbed attention compiled by XLA: attention over latents between two products per head.

Axis legend: B rows, T queries, H heads, N key width, C latent width, V value width.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.attention import Visibility
from vl2jax.ops.attention import attention as attend
from vl2jax.ops.matmul import Weight, einsum


def attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    w_kv_b: Weight,
    scale: float,
    visibility: Visibility,
) -> jax.Array:
    """Same arguments and result as `ops.latent_attention.absorbed_attention`."""
    rank, nope, dtype = w_kv_b.shape[0], q_nope.shape[-1], q_nope.dtype
    w_uk = jax.tree.map(lambda a: a[..., :nope], w_kv_b)
    w_uv = jax.tree.map(lambda a: a[..., nope:], w_kv_b)
    q_latent = einsum("BTHN,CHN->BTHC", q_nope, w_uk).astype(dtype)
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    y = attend(q, latent[:, :, None], latent[:, :, None, :rank], scale, visibility)
    return einsum("BTHC,CHV->BTHV", y, w_uv).astype(dtype)
