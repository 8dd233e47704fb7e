"""What training minimises: masked next-token loss and the experts' auxiliary balance loss.

Axis legend: B rows, T tokens, D width, E experts, K experts per token, N sequences packed in a row.
"""

import jax
import jax.numpy as jnp

from vl2jax.processing.batch import Batch


def shift_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The target of each position is the next token of the same sequence, where supervised.

    Returns:
      targets int32[B, T] and mask bool[B, T]; the last position of a sequence has no target.
    """

    def following(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    same = following(batch.segment_ids) == batch.segment_ids
    mask = following(batch.loss_mask) & same & (batch.segment_ids > 0)
    return following(batch.tokens), mask


def next_token_loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross entropy summed over supervised tokens, and their number.

    The mean is `sum / count`; both are given so that accumulation and sharding change nothing.

    Args:
      logits: float32[B, T, vocab].
      batch: the same batch.

    Returns:
      float32[] sum in nats and float32[] count.
    """
    targets, mask = shift_targets(batch)
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask, dtype=jnp.float32)


def sequence_balance_loss(
    scores: jax.Array, experts: jax.Array, segment_ids: jax.Array, max_segments: int = 1
) -> jax.Array:
    """Sequence-wise auxiliary loss, before its weight alpha (DeepSeek-V2, Eq. 23-25).

    Per sequence `sum_e f_e P_e`, f_e the share of its tokens routed to e times E / K, P_e the mean
    score of e; the mean over sequences. Padding does not count. Scores enter as they are, also
    from a sigmoid, as in the original.

    Args:
      scores: float32[B, T, E], before selection.
      experts: int32[B, T, K], the chosen ones.
      segment_ids: int32[B, T]; 0 is left out.
      max_segments: the largest segment id that occurs.

    Returns:
      float32[].
    """
    numbers = jnp.arange(1, max_segments + 1)
    member = (segment_ids[..., None] == numbers[None, None]).astype(jnp.float32)  # [B, T, N]
    lengths = member.sum(axis=1)  # [B, N]
    counts = _one_hot_counts(experts, scores.shape[-1])  # [B, T, E]
    chosen = jnp.einsum("BTN,BTE->BNE", member, counts)
    score = jnp.einsum("BTN,BTE->BNE", member, scores)
    safe = jnp.maximum(lengths, 1)[..., None]
    share = chosen / safe * (scores.shape[-1] / experts.shape[-1])
    per_sequence = jnp.sum(share * (score / safe), axis=-1)  # [B, N]
    return per_sequence.sum() / jnp.maximum((lengths > 0).sum(), 1)


def batch_balance_loss(scores: jax.Array, experts: jax.Array, mask: jax.Array) -> jax.Array:
    """Batch-wise auxiliary loss (`seq_aux` false), before its weight: all tokens as one sequence.

    Args:
      scores: float32[B, T, E].
      experts: int32[B, T, K].
      mask: bool[B, T], the tokens that count.

    Returns:
      float32[].
    """
    rows = (1, -1)
    return sequence_balance_loss(
        scores.reshape(*rows, scores.shape[-1]),
        experts.reshape(*rows, experts.shape[-1]),
        mask.reshape(rows).astype(jnp.int32),
    )


def expert_load(experts: jax.Array, mask: jax.Array, n_experts: int) -> jax.Array:
    """float32[E]: how many of the masked tokens each expert got."""
    counts = _one_hot_counts(experts, n_experts)
    return jnp.einsum("BT,BTE->E", mask.astype(jnp.float32), counts)


def _one_hot_counts(experts: jax.Array, n_experts: int) -> jax.Array:
    """int32[B, T, K] -> float32[B, T, E], 1 where chosen; not differentiated."""
    return jax.nn.one_hot(experts, n_experts, dtype=jnp.float32).sum(axis=-2)
