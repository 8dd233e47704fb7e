"""Reference implementation: expands the latents to keys and values (DeepSeek-V2, Eq. 9-19).

Axis legend: B rows, S keys, H heads, C latent width, X = N + V key and value width.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.attention import reference
from vl2jax.ops.attention.visibility import Visibility
from vl2jax.ops.matmul import Weight, dequantize


def attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    w_kv_b: Weight,
    scale: float,
    visibility: Visibility,
) -> jax.Array:
    """Same arguments and result as `ops.latent_attention.absorbed_attention`; float32 inside."""
    rank, nope, dtype = w_kv_b.shape[0], q_nope.shape[-1], q_nope.dtype
    w = dequantize(w_kv_b, dtype).astype(jnp.float32)
    latent, k_rope = jnp.split(latent.astype(jnp.float32), [rank], axis=-1)
    kv = jnp.einsum("BSC,CHX->BSHX", latent, w, precision=jax.lax.Precision.HIGHEST)
    k_nope, v = jnp.split(kv, [nope], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    return reference.attention(q, k, v, scale, visibility).astype(dtype)
