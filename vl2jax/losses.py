"""What training minimises: masked next-token loss and the experts' auxiliary balance loss.

Axis legend: B rows, T tokens, D width, E experts, K experts per token, N sequences packed in a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from vl2jax.batch import Batch
from vl2jax.layers import product


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


class LossSums(NamedTuple):
    """Sums over supervised tokens; accumulation and sharding add them up.

    Attributes:
      loss_sum: float32[], cross entropy in nats.
      count: float32[], supervised tokens.
      correct: float32[], how many of them got a higher logit than every other token.
    """

    loss_sum: jax.Array
    count: jax.Array
    correct: jax.Array


def chunked_next_token_loss(
    hidden: jax.Array, kernel: jax.Array, batch: Batch, *, dtype: jnp.dtype, chunk: int = 1024
) -> LossSums:
    """`next_token_loss` of `hidden kernel` without ever holding the logits of all tokens.

    Supervised tokens come first in each row, then a loop runs over blocks of columns until no row
    has any left.  Under differentiation the same loop computes the gradients, each block while its
    logits are there; only those of the arguments that are differentiated.

    Args:
      hidden: [B, T, D], after the final norm.
      kernel: [D, vocab], the output head; it may be wider than `dtype`, its gradient is as wide.
      batch: tells targets and mask.
      dtype: of the operands of the products, which accumulate in float32.
      chunk: tokens whose logits are held at a time.
    """
    targets, mask = shift_targets(batch)
    counts = jnp.sum(mask, axis=1)
    order = jnp.argsort(~mask, axis=1, stable=True)  # supervised first
    columns = min(max(chunk // mask.shape[0], 1), mask.shape[1])
    pad = -mask.shape[1] % columns
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(jnp.take_along_axis(targets, order, axis=1), ((0, 0), (0, pad)))
    loss_sum, correct = _sorted_loss(hidden, kernel, targets, counts, jnp.dtype(dtype), columns)
    return LossSums(loss_sum, jnp.sum(counts, dtype=jnp.float32), correct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sorted_loss(hidden, kernel, targets, counts, dtype, columns):
    """Loss sum and number of correct tokens; row b has its `counts[b]` supervised tokens first."""
    kernel = kernel.astype(dtype)

    def one_block(i, sums):
        block = _Block.at(i, columns, hidden, targets, counts)
        loss, correct, _ = block.forward(kernel)
        return sums[0] + loss, sums[1] + correct

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.fori_loop(0, _n_blocks(counts, columns), one_block, (zero, zero))


def _sorted_loss_forward(hidden, kernel, targets, counts, dtype, columns):
    """The same, and the gradients of the loss sum (None where nothing asks for one)."""
    wanted = hidden.perturbed, kernel.perturbed
    hidden, kernel, targets, counts = (a.value for a in (hidden, kernel, targets, counts))
    w = kernel.astype(dtype)
    gradients = [
        jnp.zeros(a.shape, jnp.float32) if wants else None
        for a, wants in zip((hidden, kernel), wanted, strict=True)
    ]

    def one_block(i, carry):
        loss_sum, correct_sum, (d_hidden, d_kernel) = carry
        block = _Block.at(i, columns, hidden, targets, counts)
        loss, correct, d_logits = block.forward(w)
        d_logits = d_logits.astype(dtype)
        if d_hidden is not None:
            d_block = product("BTv,Dv->BTD", d_logits, w)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_block, i * columns, axis=1)
        if d_kernel is not None:
            d_kernel += product("BTD,BTv->Dv", block.hidden.astype(dtype), d_logits)
        return loss_sum + loss, correct_sum + correct, [d_hidden, d_kernel]

    zero = jnp.zeros((), jnp.float32)
    loss_sum, correct, gradients = jax.lax.fori_loop(
        0, _n_blocks(counts, columns), one_block, (zero, zero, gradients)
    )
    # Empty arrays carry the dtypes of the arguments to the backward pass.
    return (loss_sum, correct), (gradients, hidden[:0], kernel[:0])


def _sorted_loss_backward(dtype, columns, residuals, cotangents):
    gradients, *arguments = residuals
    scale = cotangents[0]
    if type(scale) is SymbolicZero:
        return None, None, None, None
    scaled = (
        None if g is None else (g * scale).astype(a.dtype)
        for g, a in zip(gradients, arguments, strict=True)
    )
    return *scaled, None, None


_sorted_loss.defvjp(_sorted_loss_forward, _sorted_loss_backward, symbolic_zeros=True)


class _Block(NamedTuple):
    """Some columns of all rows: hidden [B, T, D], targets int32[B, T], valid bool[B, T]."""

    hidden: jax.Array
    targets: jax.Array
    valid: jax.Array

    @classmethod
    def at(cls, i, columns, hidden, targets, counts) -> "_Block":
        hidden, targets = (
            jax.lax.dynamic_slice_in_dim(a, i * columns, columns, axis=1) for a in (hidden, targets)
        )
        valid = (i * columns + jnp.arange(columns))[None] < counts[:, None]
        return cls(hidden, targets, valid)

    def forward(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Loss sum, number of correct tokens, and float32[B, T, vocab] gradient of the logits."""
        logits = product("BTD,Dv->BTv", self.hidden.astype(kernel.dtype), kernel)
        chosen = jnp.take_along_axis(logits, self.targets[..., None], axis=-1)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        exponentials = jnp.exp(logits - highest)
        total = jnp.sum(exponentials, axis=-1, keepdims=True)
        losses = (jnp.log(total) + highest - chosen)[..., 0]
        best = jnp.sum(logits >= chosen, axis=-1) == 1  # the target itself and no other
        tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        d_logits = exponentials / total - (tokens == self.targets[..., None])
        return (
            jnp.sum(jnp.where(self.valid, losses, 0)),
            jnp.sum(self.valid & best, dtype=jnp.float32),
            jnp.where(self.valid[..., None], d_logits, 0),
        )


def _n_blocks(counts: jax.Array, columns: int) -> jax.Array:
    """int32[]: blocks until no row has a supervised token left."""
    return -(-jnp.max(counts) // columns)


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
