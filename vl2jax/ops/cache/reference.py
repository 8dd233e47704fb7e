"""Reference implementation of cache writes: compares every slot with the token's position."""

import jax
import jax.numpy as jnp


def write(stack: jax.Array, layer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Writes one token per row, `new` [B, ..., 1, K], to `stack` [n, B, ..., S, K]."""
    between = (1,) * (stack.ndim - 4)
    n, rows, slots = stack.shape[0], stack.shape[1], stack.shape[-2]
    in_layer = (jnp.arange(n) == layer).reshape(n, 1, *between, 1, 1)
    in_slot = jnp.arange(slots)[None] == positions
    return jnp.where(in_layer & in_slot.reshape(1, rows, *between, slots, 1), new[None], stack)
