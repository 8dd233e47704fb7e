"""Who sees whom in attention.

Axis legend: B rows, T queries, S keys.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Visibility:
    """A query sees the keys of its own segment that are not later than itself.

    Attributes:
      q_positions, q_segments: int32[B, T].
      k_positions, k_segments: int32[B, S]. Segment 0 is padding, which nobody sees.
      ordered: whether query i and key i are the same token and no query sees a later key: then
        whole chunks of those are not even looked at.
    """

    q_positions: jax.Array
    q_segments: jax.Array
    k_positions: jax.Array
    k_segments: jax.Array
    ordered: bool = flax.struct.field(pytree_node=False, default=False)

    def mask(self) -> jax.Array:
        """bool[B, T, S], True where the query sees the key."""
        causal = self.k_positions[:, None, :] <= self.q_positions[:, :, None]
        same = self.k_segments[:, None, :] == self.q_segments[:, :, None]
        return causal & same & (self.k_segments > 0)[:, None, :]

    def repeat_queries(self, times: int) -> "Visibility":
        """Every query so many times, one after the other."""
        return dataclasses.replace(
            self,
            q_positions=jnp.repeat(self.q_positions, times, axis=1),
            q_segments=jnp.repeat(self.q_segments, times, axis=1),
            ordered=False,
        )
