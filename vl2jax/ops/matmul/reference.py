"""The oracle of products: float32 throughout, the weight as a plain array."""

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul.int8 import Weight, widen


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """`x w` in float32, of a weight that is first rounded to the dtype of x."""
    w = widen(w, x.dtype).astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)
