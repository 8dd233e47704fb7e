"""Sampling of the next token: repetition penalty, temperature, top-k, top-p, then one draw.

The order and the definitions are those of Hugging Face `generate`.

Axis legend: B rows.
"""

import flax.struct
import jax
import jax.numpy as jnp

from vl2jax.common.errors import UserError


@flax.struct.dataclass
class SamplingParams:
    """Parameters of sampling; the numbers can change without a recompilation.

    Attributes:
      temperature: divides the logits; 0 means greedy decoding.
      top_k: keeps the k highest logits and ties with the k-th; 0 keeps all.
      top_p: keeps the smallest set of tokens whose probabilities add up to at least this; 1 keeps
        all.
      repetition_penalty: divides positive and multiplies negative logits of tokens that occur in
        prompt or answer.
      greedy: whether to take the token with the highest logit; static, so it selects a program.
    """

    temperature: float | jax.Array
    top_k: int | jax.Array
    top_p: float | jax.Array
    repetition_penalty: float | jax.Array
    greedy: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def create(
        cls,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> "SamplingParams":
        """Makes parameters after checking their ranges.

        Raises:
          UserError: a parameter is out of range.
        """
        ranges = [
            ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0 and top_k == int(top_k), "a whole number, 0 for all"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
        ]
        wrong = [
            f"{name} must be {want}, got {got}" for name, got, fits, want in ranges if not fits
        ]
        if wrong:
            raise UserError("; ".join(wrong))
        return cls(
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            repetition_penalty=float(repetition_penalty),
            greedy=temperature == 0,
        )


def penalize(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """Applies the repetition penalty to the logits of tokens in `seen`.

    Args:
      logits: float32[B, vocab].
      seen: bool[B, vocab], tokens that occur in prompt or answer.
      penalty: divides positive logits and multiplies negative ones.

    Returns:
      float32[B, vocab].
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: jax.Array, top_k: int | jax.Array) -> jax.Array:
    """Sets all but the k highest logits [B, vocab] to -inf; keeps ties.  0 keeps all logits."""
    ascending = jnp.sort(logits, axis=-1)
    kth = jnp.clip(logits.shape[-1] - top_k, 0, logits.shape[-1] - 1)
    lowest = jnp.take(ascending, kth, axis=-1)[..., None]
    return jnp.where((top_k > 0) & (logits < lowest), -jnp.inf, logits)


def keep_top_p(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Sets logits [B, vocab] outside the nucleus to -inf.

    The least likely tokens are removed as long as their probabilities add up to at most 1 - p.
    """
    order = jnp.argsort(logits, axis=-1, stable=True)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    tail = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
    tail = tail.at[..., -1].set(False)  # the most likely token always stays
    removed = jnp.take_along_axis(tail, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where((top_p < 1) & removed, -jnp.inf, logits)


def process_logits(params: SamplingParams, logits: jax.Array, seen: jax.Array) -> jax.Array:
    """Applies penalty, temperature, top-k and top-p; with `greedy` only the penalty.

    Args:
      params: see `SamplingParams`.
      logits: float32[B, vocab].
      seen: bool[B, vocab], tokens that occur in prompt or answer.

    Returns:
      float32[B, vocab].
    """
    logits = penalize(logits, seen, params.repetition_penalty)
    if params.greedy:
        return logits
    logits = keep_top_k(logits / params.temperature, params.top_k)
    return keep_top_p(logits, params.top_p)


def next_token(
    params: SamplingParams, logits: jax.Array, seen: jax.Array, keys: jax.Array
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      params: see `SamplingParams`.
      logits: float32[B, vocab].
      seen: bool[B, vocab], tokens that occur in prompt or answer.
      keys: PRNG keys [B], one per row, so that the draw of a row does not depend on the others.

    Returns:
      int32[B].
    """
    logits = process_logits(params, logits, seen)
    if params.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
