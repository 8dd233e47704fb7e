"""Reference implementation of matrix products: everything in float32."""

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul.int8 import Weight, dequantize


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Computes `x w` in float32 after rounding the weight to the dtype of x."""
    w = dequantize(w, x.dtype).astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
