"""Matrix products on CPU.

XLA's CPU compiler has no fast path for a single bfloat16 row, so a row of zeros is added.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul import xla
from vl2jax.ops.matmul.int8 import Weight


def unsupported(x: jax.Array, w: Weight) -> str:
    """Supports a single bfloat16 row."""
    return "" if x.shape[0] == 1 and x.dtype == jnp.bfloat16 else "more than one row, or float32"


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Computes `x w`: [1, K] times [K, N] is float32[1, N]."""
    return xla.matmul(jnp.pad(x, ((0, 1), (0, 0))), w)[:1]
