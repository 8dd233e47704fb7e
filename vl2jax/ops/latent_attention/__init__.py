"""Absorbed attention over MLA's cached latent (DeepSeek-V2, section 2.1.2): nothing is expanded per
cached token.

`W_UK` goes into the query and `W_UV` into the output.  `reference.py` expands keys and values as
the equations stand, `xla.py` absorbs, `cpu.py` does so for few queries without products by heads.
"""

import jax

from vl2jax.ops.attention import Visibility
from vl2jax.ops.latent_attention import cpu, reference, xla
from vl2jax.ops.matmul import Weight
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["absorbed_attention"]

_ABSORBED = Operation(
    "latent_attention",
    Implementation("cpu", cpu.attention, ("cpu",), cpu.refuses),
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
    """Attention whose keys and values are the latent itself.

    Args:
      q_nope: [B, T, H, N], the part of the query without position.
      q_rope: [B, T, H, R], the rotated part.
      latent: [B, S, C + R], the normed latent and the rotated key that all heads share.
      w_kv_b: [C, H, N + V], expands the latent to keys and values.
      scale: multiplies the scores.
      visibility: who sees whom.

    Returns:
      [B, T, H, V] in the dtype of the query.
    """
    return _ABSORBED(q_nope, q_rope, latent, w_kv_b, scale, visibility)
