"""The softmax of attention: masks from positions and segments, queries in chunks.

Axis legend: B rows, T queries, S keys, H heads (1 in k and v: shared), K query width,
V value width.
"""

import flax.struct
import jax
import jax.numpy as jnp

QUERY_CHUNK = 256  # queries per step once T * S is large
_WHOLE = 1024  # up to this many queries, one step


@flax.struct.dataclass
class Visibility:
    """Who sees whom: a query sees the keys of its own segment that are not later than itself.

    Attributes:
      q_positions, q_segments: int32[B, T].
      k_positions, k_segments: int32[B, S]. Segment 0 is padding, which nobody sees.
    """

    q_positions: jax.Array
    q_segments: jax.Array
    k_positions: jax.Array
    k_segments: jax.Array

    def mask(self) -> jax.Array:
        """bool[B, T, S], True where the query sees the key."""
        causal = self.k_positions[:, None, :] <= self.q_positions[:, :, None]
        same = self.k_segments[:, None, :] == self.q_segments[:, :, None]
        return causal & same & (self.k_segments > 0)[:, None, :]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None = None
) -> jax.Array:
    """`softmax(q k^T scale) v`, softmax in float32.

    A query that sees no key (padding) gets the mean of all values, as in the original.

    Args:
      q: [B, T, H, K].
      k: [B, S, H or 1, K].
      v: [B, S, H or 1, V].
      scale: multiplies the scores.
      visibility: None: every query sees every key.

    Returns:
      [B, T, H, V] in the dtype of v.
    """
    length = q.shape[1]
    if length <= _WHOLE:
        return _attend(q, k, v, scale, visibility)
    chunks = -(-length // QUERY_CHUNK)

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B, QUERY_CHUNK, ...]
        pad = ((0, 0), (0, chunks * QUERY_CHUNK - length), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, pad).reshape(x.shape[0], chunks, QUERY_CHUNK, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def step(chunk):
        q, positions = chunk
        seen = visibility
        if seen is not None:
            seen = seen.replace(q_positions=positions[0], q_segments=positions[1])
        return _attend(q, k, v, scale, seen)

    positions = None
    if visibility is not None:
        positions = (split(visibility.q_positions), split(visibility.q_segments))
    out = jnp.moveaxis(jax.lax.map(step, (split(q), positions)), 0, 1)
    return out.reshape(q.shape[0], chunks * QUERY_CHUNK, *out.shape[3:])[:, :length]


def _attend(q, k, v, scale, visibility):
    """All queries at once; keys and values with one head are shared by all heads."""
    heads = "H" if k.shape[2] == q.shape[2] else "1"
    if heads == "1":
        k, v = k[:, :, 0], v[:, :, 0]
    k_axes, v_axes = ("BSHK", "BSHV") if heads == "H" else ("BSK", "BSV")
    scores = jnp.einsum(f"BTHK,{k_axes}->BHTS", q, k, preferred_element_type=jnp.float32) * scale
    if visibility is not None:
        # Added, not replaced: the same numbers, and the original's gradients at padding too.
        hidden = jnp.where(visibility.mask(), 0, jnp.finfo(jnp.float32).min)
        scores += hidden[:, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum(f"BHTS,{v_axes}->BTHV", weights, v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype)
