"""Caches on CPU: written in place, kept as bits where XLA would copy them."""

import jax
import jax.numpy as jnp

from vl2jax.parallel.mesh import current_mesh

_COPIES_FLOAT32 = jax.__version_info__ < (0, 12)


def stored_dtype(dtype: jnp.dtype, by_heads: bool) -> jnp.dtype:
    """bfloat16 is kept as its bits, uint16: to write one token, XLA's compiler would make all of
    the cache float32 and bfloat16 again.  By heads, so is float32 before jax 0.12: to read a cache
    that it writes in place, it would copy it, three times per token."""
    if dtype == jnp.bfloat16:
        return jnp.dtype(jnp.uint16)
    if dtype == jnp.float32 and by_heads and _COPIES_FLOAT32:
        return jnp.dtype(jnp.uint32)
    return dtype


def refuses(*_) -> str:
    """One device is served."""
    return "on a mesh" if current_mesh() is not None else ""


def write(stack: jax.Array, layer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """One token per row, in place, where a scatter would go through all of `stack`; and not fused
    with what reads it, which would write all of it anew."""
    between = (0,) * (new.ndim - 3)

    def put(row: jax.Array, stack: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(new, row, 1)[None]
        start = (layer, row, *between, positions[row, 0], 0)
        return jax.lax.dynamic_update_slice(stack, one, start)

    stack = jax.lax.fori_loop(0, len(new), put, stack, unroll=min(len(new), 8))
    return jax.lax.optimization_barrier(stack)
