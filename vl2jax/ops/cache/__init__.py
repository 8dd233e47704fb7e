"""Caches of decoding: how values are stored, written token by token, and read again.

A cache is a stack [n, B, ..., S, K] of n layers with S slots per row.  `reference.py` asks every
slot; `xla.py` is one scatter; `cpu.py` writes in place, row by row, and keeps bfloat16 as bits.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.cache import cpu, reference, xla
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["read", "stored_dtype", "write"]

_DTYPE = Operation(
    "cache_dtype",
    Implementation("cpu", cpu.stored_dtype, ("cpu",)),
    Implementation("xla", xla.stored_dtype),
)
_WRITE = Operation(
    "cache_write",
    Implementation("cpu", cpu.write, ("cpu",), cpu.refuses),
    Implementation("xla", xla.write),
    Implementation("reference", reference.write),
)
# What a cache that is kept as bits holds.
_OF_BITS = {jnp.dtype(jnp.uint16): jnp.bfloat16, jnp.dtype(jnp.uint32): jnp.float32}


def stored_dtype(dtype: jnp.dtype, *, by_heads: bool) -> jnp.dtype:
    """The dtype in which a cache of values of `dtype` is stored.

    Args:
      dtype: of the values.
      by_heads: whether it has an axis of heads (MHA), or is a latent (MLA).
    """
    return _DTYPE(jnp.dtype(dtype), by_heads)


def write(stack: jax.Array, layer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Puts the values of new tokens into the slots of their positions, in one layer.

    With T > 1 (a prefill chunk) all rows start at the same position.  What a row that is done
    writes beyond the last slot is lost, or on CPU replaces that slot.

    Args:
      stack: [n, B, ..., S, K].
      layer: int32[].
      new: [B, ..., T, K].
      positions: int32[B, T].

    Returns:
      The stack with these slots replaced.
    """
    new = _as_stored(new, stack.dtype)
    if new.shape[-2] == 1:
        return _WRITE(stack, layer, new, positions)
    between = (0,) * (new.ndim - 3)
    return jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, *between, positions[0, 0], 0))


def read(stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What a cache holds, in this dtype."""
    if stored.dtype in _OF_BITS:
        stored = jax.lax.bitcast_convert_type(stored, _OF_BITS[stored.dtype])
    return stored.astype(dtype)


def _as_stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `read`."""
    if dtype not in _OF_BITS:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x.astype(_OF_BITS[dtype]), dtype)
