"""KV cache on CPU: bfloat16 values are stored as their bits, in uint16.

XLA's CPU compiler has no bfloat16 scatter: to write one token, it would convert the whole cache to
float32 and back.
"""

import jax.numpy as jnp


def unsupported(dtype: jnp.dtype) -> str:
    """Supports bfloat16."""
    return "" if dtype == jnp.bfloat16 else "not bfloat16"


def stored_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """bfloat16 values are stored as uint16."""
    del dtype
    return jnp.dtype(jnp.uint16)
