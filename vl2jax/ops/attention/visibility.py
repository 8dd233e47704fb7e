"""Attention masks, given by the positions and segments of queries and keys.

Axis legend: B rows, T queries, S keys.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Visibility:
    """A causal mask within segments: a query sees keys of its segment up to its own position.

    Attributes:
      q_positions, q_segments: int32[B, T].
      k_positions, k_segments: int32[B, S].  Segment 0 is padding, which no query sees.
      ordered: whether query i and key i are the same token, and no query i sees a key j > i.
        Implementations may then skip chunks of keys above the diagonal.
    """

    q_positions: jax.Array
    q_segments: jax.Array
    k_positions: jax.Array
    k_segments: jax.Array
    ordered: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self) -> jax.Array:
        """Returns the mask: bool[B, T, S], True where the query sees the key."""
        causal = self.k_positions[:, None, :] <= self.q_positions[:, :, None]
        same = self.k_segments[:, None, :] == self.q_segments[:, :, None]
        return causal & same & (self.k_segments > 0)[:, None, :]

    def repeat_queries(self, times: int) -> "Visibility":
        """Repeats every query `times` times, the copies next to each other."""
        return dataclasses.replace(
            self,
            q_positions=jnp.repeat(self.q_positions, times, axis=1),
            q_segments=jnp.repeat(self.q_segments, times, axis=1),
            ordered=False,
        )
