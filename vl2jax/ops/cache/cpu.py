"""KV cache on CPU: written in place, and stored as bits if XLA would copy it otherwise."""

import jax
import jax.numpy as jnp

from vl2jax.parallel.mesh import current_mesh

_COPIES_FLOAT32 = jax.__version_info__ < (0, 12)


def stored_dtype(dtype: jnp.dtype, by_heads: bool) -> jnp.dtype:
    """bfloat16 is stored as its bits in uint16, and for MHA before jax 0.12 float32 in uint32.

    To write one token to a bfloat16 cache, XLA's CPU compiler converts the whole cache to float32
    and back.  Before jax 0.12, it copies a float32 cache with heads that it writes in place and
    then reads, three times per token.
    """
    if dtype == jnp.bfloat16:
        return jnp.dtype(jnp.uint16)
    if dtype == jnp.float32 and by_heads and _COPIES_FLOAT32:
        return jnp.dtype(jnp.uint32)
    return dtype


def refuses(*_) -> str:
    """Supports a single device."""
    return "on a mesh" if current_mesh() is not None else ""


def write(stack: jax.Array, layer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes one token per row, in place; a scatter would go through all of `stack`.

    The barrier keeps XLA from fusing the write with later reads, which would write the whole stack
    again.
    """
    between = (0,) * (new.ndim - 3)

    def put(row: jax.Array, stack: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(new, row, 1)[None]
        start = (layer, row, *between, positions[row, 0], 0)
        return jax.lax.dynamic_update_slice(stack, one, start)

    stack = jax.lax.fori_loop(0, len(new), put, stack, unroll=min(len(new), 8))
    return jax.lax.optimization_barrier(stack)
