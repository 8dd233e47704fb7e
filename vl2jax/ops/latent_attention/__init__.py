"""Absorbed attention: MLA attention directly over the cached latents (DeepSeek-V2, section 2.1.2).

`W_UK` is absorbed into the query and `W_UV` into the output, so no cached latent is expanded to
keys and values.  `xla.py` absorbs with one matrix product per head.  `reference.py` expands keys
and values, as in the paper's equations.

Axis legend: B rows, T queries, S cache slots, H heads, N qk_nope_head_dim, R qk_rope_head_dim,
V v_head_dim, C kv_lora_rank.
"""

import jax

from vl2jax.ops.attention import Visibility
from vl2jax.ops.latent_attention import reference, xla
from vl2jax.ops.matmul import Weight
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["absorbed_attention"]

_ABSORBED = Operation(
    "latent_attention",
    Implementation("xla", xla.attention),
    Implementation("reference", reference.attention),
)


def absorbed_attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    w_kv_b: Weight,
    scale: float,
    visibility: Visibility,
) -> jax.Array:
    """Computes MLA attention over cached latents.

    Args:
      q_nope: [B, T, H, N], the part of the query without position encoding.
      q_rope: [B, T, H, R], the rotated part of the query.
      latent: [B, S, C + R], the latent after its norm and the rotated key that all heads share.
      w_kv_b: [C, H, N + V], the weight that expands a latent to keys and values.
      scale: factor of the scores.
      visibility: which slots each query sees.

    Returns:
      [B, T, H, V] in the dtype of the query.
    """
    return _ABSORBED(q_nope, q_rope, latent, w_kv_b, scale, visibility)
