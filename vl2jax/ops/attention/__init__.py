"""Attention: `softmax(q k^T scale + mask) v`, with the softmax in float32 (DeepSeek-V2, Eq. 7-8).

`reference.py` computes the equation directly.  `xla.py` processes queries in chunks.  `cpu.py` is
`xla.py` with chunk sizes for a CPU's caches.  `tpu.py` is a flash-attention kernel, which never
writes scores to main memory.
"""

import jax

from vl2jax.ops.attention import cpu, reference, tpu, xla
from vl2jax.ops.attention.visibility import Visibility
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["Visibility", "attention"]

_ATTENTION = Operation(
    "attention",
    Implementation("tpu", tpu.attention, ("tpu",), tpu.unsupported),
    Implementation("cpu", cpu.attention, ("cpu",)),
    Implementation("xla", xla.attention),
    Implementation("reference", reference.attention),
)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None = None
) -> jax.Array:
    """Computes scaled dot-product attention.

    The result of a query that sees no key (padding) is unspecified: it is the mean of all values
    that the implementation reads or, on TPU, attention over earlier padding.

    Args:
      q: [B, T, H, K].
      k: [B, S, H or 1, K]; 1: all heads share the keys.
      v: [B, S, H or 1, V].
      scale: factor of the scores.
      visibility: which keys each query sees; None: all.

    Returns:
      [B, T, H, V] in the dtype of v.
    """
    return _ATTENTION(q, k, v, scale, visibility)
