"""Training losses: masked next-token cross entropy and the auxiliary load-balance loss.

Axis legend: B rows, T tokens, D width, E experts, K experts per token, N sequences packed in a row.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul import product
from vl2jax.processing.batch import Batch


def shift_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Targets of the next-token loss: at each position the next token of the same sequence.

    Returns:
      Targets int32[B, T], and a mask bool[B, T] that is True where the target is supervised.  The
      last position of a sequence has no target.
    """

    def following(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    same = following(batch.segment_ids) == batch.segment_ids
    mask = following(batch.loss_mask) & same & (batch.segment_ids > 0)
    return following(batch.tokens), mask


def next_token_loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross entropy, summed over supervised tokens, and their number.

    The mean loss is `sum / count`.  Returning both lets callers add them up over microbatches and
    devices before they divide.

    Args:
      logits: float32[B, T, vocab].
      batch: the batch that gave the logits.

    Returns:
      The sum in nats, float32[], and the count, float32[].
    """
    targets, mask = shift_targets(batch)
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(mask, losses, 0)), jnp.sum(mask, dtype=jnp.float32)


def sequence_balance_loss(
    scores: jax.Array, experts: jax.Array, segment_ids: jax.Array, max_segments: int = 1
) -> jax.Array:
    """Sequence-wise auxiliary loss, without its factor alpha (DeepSeek-V2, Eq. 23-25).

    The loss of a sequence is `sum_e f_e P_e`: f_e is E / K times the fraction of its tokens routed
    to expert e, and P_e the mean score of e.  The result is the mean over sequences.  As in the
    original, sigmoid scores are not normalised.

    Args:
      scores: float32[B, T, E], scores of all experts.
      experts: int32[B, T, K], the chosen experts.
      segment_ids: int32[B, T]; tokens with segment 0 (padding) are not counted.
      max_segments: the largest segment id in the batch.

    Returns:
      float32[].
    """
    numbers = jnp.arange(1, max_segments + 1)
    member = (segment_ids[..., None] == numbers[None, None]).astype(jnp.float32)  # [B, T, N]
    lengths = member.sum(axis=1)  # [B, N]
    counts = _one_hot_counts(experts, scores.shape[-1])  # [B, T, E]
    chosen = product("BTN,BTE->BNE", member, counts)
    score = product("BTN,BTE->BNE", member, scores)
    safe = jnp.maximum(lengths, 1)[..., None]
    share = chosen / safe * (scores.shape[-1] / experts.shape[-1])
    per_sequence = jnp.sum(share * (score / safe), axis=-1)  # [B, N]
    return per_sequence.sum() / jnp.maximum((lengths > 0).sum(), 1)


def batch_balance_loss(scores: jax.Array, experts: jax.Array, mask: jax.Array) -> jax.Array:
    """Batch-wise auxiliary loss (`seq_aux` false), without its factor alpha.

    It is the sequence-wise loss with all tokens of the batch as one sequence.

    Args:
      scores: float32[B, T, E], scores of all experts.
      experts: int32[B, T, K], the chosen experts.
      mask: bool[B, T], True for tokens that count.

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
    """Number of tokens routed to each expert.

    Args:
      experts: int32[B, T, K], the chosen experts.
      mask: bool[B, T], True for tokens that count.
      n_experts: E.

    Returns:
      float32[E].
    """
    counts = _one_hot_counts(experts, n_experts)
    return product("BT,BTE->E", mask.astype(jnp.float32), counts)


def _one_hot_counts(experts: jax.Array, n_experts: int) -> jax.Array:
    """How often each expert was chosen: int32[B, T, K] -> float32[B, T, E], without gradient."""
    return jax.nn.one_hot(experts, n_experts, dtype=jnp.float32).sum(axis=-2)
