"""KV caches on CPU: bfloat16 values are stored as their bits, in uint16.

XLA's CPU compiler has no bfloat16 scatter.  To write one token it would convert the whole cache to
float32 and back.
"""

import jax.numpy as jnp


def refuses(dtype: jnp.dtype) -> str:
    """Serves bfloat16."""
    return "" if dtype == jnp.bfloat16 else "not bfloat16"


def stored_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """uint16."""
    del dtype
    return jnp.dtype(jnp.uint16)
