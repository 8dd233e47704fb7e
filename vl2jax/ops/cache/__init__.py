"""KV cache: the dtype it is stored in, and how new tokens are written to it and read from it.

A cache is a stack [n, B, ..., S, K] of n layers with S slots per row.  `reference.py` compares
every slot with the position.  `xla.py` is one scatter.  `cpu.py` stores bfloat16 values as their
bits.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.cache import cpu, reference, xla
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["read", "stored_dtype", "write"]

_DTYPE = Operation(
    "cache_dtype",
    Implementation("cpu", cpu.stored_dtype, ("cpu",), cpu.unsupported),
    Implementation("xla", xla.stored_dtype),
)
_WRITE = Operation(
    "cache_write",
    Implementation("xla", xla.write),
    Implementation("reference", reference.write),
)
# Dtype of the values in a cache that stores their bits as integers.
_VALUE_DTYPES = {jnp.dtype(jnp.uint16): jnp.bfloat16}


def stored_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which a cache stores its values.

    Args:
      dtype: dtype of the values.

    Returns:
      `dtype`, or an unsigned integer dtype of the same width for a cache that stores bits.
    """
    return _DTYPE(jnp.dtype(dtype))


def write(stack: jax.Array, layer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes the values of new tokens to the slots of their positions, in one layer.

    If T > 1 (a prefill chunk), all rows must start at the same position.  If T = 1, a finished
    sequence may write beyond the last slot; that write is dropped.

    Args:
      stack: [n, B, ..., S, K], the cache.
      layer: int32[], index of the layer.
      new: [B, ..., T, K], values of the new tokens.
      positions: int32[B, T].

    Returns:
      The updated cache, [n, B, ..., S, K].
    """
    new = _to_stored(new, stack.dtype)
    if new.shape[-2] == 1:
        return _WRITE(stack, layer, new, positions)
    zeros = (0,) * (new.ndim - 3)
    return jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, *zeros, positions[0, 0], 0))


def read(stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Reads stored values as `dtype`."""
    if stored.dtype in _VALUE_DTYPES:
        stored = jax.lax.bitcast_convert_type(stored, _VALUE_DTYPES[stored.dtype])
    return stored.astype(dtype)


def _to_stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Converts values to the stored dtype, the inverse of `read`."""
    if dtype not in _VALUE_DTYPES:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x.astype(_VALUE_DTYPES[dtype]), dtype)
