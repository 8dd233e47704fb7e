"""Attention: `softmax(q k^T scale + mask) v`, the softmax in float32 (DeepSeek-V2, Eq. 7-8).

`reference.py` is the equation as it stands, `xla.py` goes through the queries in chunks, `cpu.py`
adapts that to a CPU's caches, `tpu.py` is a kernel that never writes scores to memory.
"""

import jax

from vl2jax.ops.attention import cpu, reference, tpu, xla
from vl2jax.ops.attention.visibility import Visibility
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["Visibility", "attention"]

_ATTENTION = Operation(
    "attention",
    Implementation("tpu", tpu.attention, ("tpu",), tpu.refuses),
    Implementation("cpu", cpu.attention, ("cpu",)),
    Implementation("xla", xla.attention),
    Implementation("reference", reference.attention),
)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None = None
) -> jax.Array:
    """Every query's mean of the values that it sees, weighted by the softmax of its scores.

    What a query gets that sees no key (padding) is nobody's business: the mean of all values that
    are looked at, or on TPU what earlier padding gives.

    Args:
      q: [B, T, H, K].
      k: [B, S, H or 1, K]; 1: all heads share it.
      v: [B, S, H or 1, V].
      scale: multiplies the scores.
      visibility: None: every query sees every key.

    Returns:
      [B, T, H, V] in the dtype of v.
    """
    return _ATTENTION(q, k, v, scale, visibility)
