"""Next-token loss that computes logits and their gradients for one block of tokens at a time.

The logits of all tokens would not fit in memory with a large vocabulary.  On a mesh, each device
loops over its own rows.  It gathers the output head over `fsdp` before the first block and reduces
its gradient after the last one.  Within the loop, devices communicate only if the vocabulary is
sharded over `tensor`, and then only a few numbers per token.

Axis legend: B rows, T tokens, D width, v vocabulary (on a mesh, the part of one device).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, PartitionSpec

from vl2jax.model.losses import shift_targets
from vl2jax.ops.matmul import product
from vl2jax.parallel.mesh import axis_size, batch_axes, batch_shards, current_mesh
from vl2jax.processing.batch import Batch


class LossSums(NamedTuple):
    """Sums over supervised tokens, which can be added up over microbatches and devices.

    Attributes:
      loss_sum: float32[], cross entropy in nats.
      count: float32[], number of supervised tokens.
      correct: float32[], number of supervised tokens whose logit is higher than all others.
    """

    loss_sum: jax.Array
    count: jax.Array
    correct: jax.Array


def chunked_next_token_loss(
    hidden: jax.Array, kernel: jax.Array, batch: Batch, *, dtype: jnp.dtype, chunk: int = 1024
) -> LossSums:
    """`next_token_loss` of the logits `hidden @ kernel`, without all logits in memory.

    The tokens of each row are sorted, supervised ones first.  A loop runs over blocks of columns
    until no row has supervised tokens left.  If the loss is differentiated, the same loop computes
    the gradients of each block right after its logits, for those arguments that need one.  On a
    mesh, each device loops over its own rows; if the mesh does not divide the rows or the kernel,
    XLA shards a single loop instead.

    Args:
      hidden: [B, T, D], output of the final norm.
      kernel: [D, vocab], the output head.  It is cast to `dtype`; its gradient has its own dtype.
      batch: gives the targets and the mask.
      dtype: dtype of the operands of matrix products, which accumulate in float32.
      chunk: number of tokens whose logits a device holds at a time; at least one per row.

    Returns:
      The sums over all rows, on all devices.
    """
    targets, mask = shift_targets(batch)
    rows, length = mask.shape
    mesh = _dividing_mesh(rows, kernel)
    here = rows if mesh is None else rows // batch_shards(mesh)
    columns = min(max(chunk // here, 1), length)
    counts = jnp.sum(mask, axis=1)
    order = jnp.argsort(~mask, axis=1, stable=True)  # supervised first
    pad = -length % columns
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(jnp.take_along_axis(targets, order, axis=1), ((0, 0), (0, pad)))
    loop_config = _LoopConfig(jnp.dtype(dtype), columns, mesh)
    # `Any`, because custom_vjp hides the type.
    sums: Any = _sorted_loss(hidden, kernel, targets, counts, loop_config)
    loss_sum, correct = sums
    return LossSums(loss_sum, jnp.sum(counts, dtype=jnp.float32), correct)


class _LoopConfig(NamedTuple):
    """dtype of the operands, columns per block, and the mesh (None: XLA shards the loop)."""

    dtype: jnp.dtype
    columns: int
    mesh: AbstractMesh | None


def _dividing_mesh(rows: int, kernel: jax.Array) -> AbstractMesh | None:
    """The current mesh, if it divides the rows and both axes of the kernel; otherwise None."""
    mesh = current_mesh()
    if mesh is None:
        return None
    parts = batch_shards(mesh), axis_size(mesh, "fsdp"), axis_size(mesh, "tensor")
    sizes = rows, *kernel.shape
    return None if any(size % n for size, n in zip(sizes, parts, strict=True)) else mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sorted_loss(hidden, kernel, targets, counts, loop_config) -> tuple[jax.Array, jax.Array]:
    """Loss sum and number of correct tokens, of the first `counts[b]` tokens of each row b."""
    return _sums_and_gradients(hidden, kernel, targets, counts, loop_config, (False, False))[0]


def _sorted_loss_forward(hidden, kernel, targets, counts, loop_config):
    """The same, and residuals: the gradients of the loss sum, None for those not needed."""
    wanted = hidden.perturbed, kernel.perturbed
    hidden, kernel, targets, counts = (a.value for a in (hidden, kernel, targets, counts))
    sums, gradients = _sums_and_gradients(hidden, kernel, targets, counts, loop_config, wanted)
    # The empty arrays pass the dtypes of the arguments to the backward pass.
    return sums, (gradients, hidden[:0], kernel[:0])


def _sorted_loss_backward(loop_config, residuals, cotangents):
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


def _sums_and_gradients(
    hidden, kernel, targets, counts, loop_config: _LoopConfig, wanted: tuple[bool, bool]
):
    """(loss sum, correct tokens), and float32 [d_hidden, d_kernel], None if not wanted."""
    dtype, columns, mesh = loop_config
    loop = functools.partial(_loop, columns, wanted)
    if mesh is None:
        blocks = _n_blocks(counts, columns)
        return loop(None, blocks, hidden, kernel.astype(dtype), targets, counts)

    batch = tuple(axis for axis in batch_axes(mesh) if axis_size(mesh, axis) > 1)
    fsdp, tensor = (axis if axis_size(mesh, axis) > 1 else None for axis in ("fsdp", "tensor"))

    def on_one_device(hidden, kernel, targets, counts):
        blocks, kernel = _n_blocks(counts, columns), kernel.astype(dtype)
        # The loop body has collectives over `tensor`, so all devices run the same number of blocks.
        if tensor is not None:
            blocks = jax.lax.pmax(blocks, batch)
        if fsdp is not None:
            kernel = jax.lax.all_gather(kernel, fsdp, axis=0, tiled=True)
        sums, (d_hidden, d_kernel) = loop(tensor, blocks, hidden, kernel, targets, counts)
        if d_hidden is not None and tensor is not None:
            d_hidden = jax.lax.psum(d_hidden, tensor)
        if d_kernel is not None:
            if fsdp is not None:
                d_kernel = jax.lax.psum_scatter(d_kernel, fsdp, scatter_dimension=0, tiled=True)
            d_kernel = jax.lax.psum(d_kernel, tuple(axis for axis in batch if axis != fsdp))
        return jax.lax.psum(sums, batch), [d_hidden, d_kernel]

    rows, split = PartitionSpec(batch), PartitionSpec(fsdp, tensor)
    return jax.shard_map(
        on_one_device,
        in_specs=(rows, split, rows, rows),
        out_specs=(PartitionSpec(), [rows, split]),
        check_vma=False,
    )(hidden, kernel, targets, counts)


def _loop(columns, wanted, tensor, n_blocks, hidden, kernel, targets, counts):
    """`_sums_and_gradients` of one device; over `tensor`, d_hidden is a partial sum."""
    gradients = [
        jnp.zeros(a.shape, jnp.float32) if wants else None
        for a, wants in zip((hidden, kernel), wanted, strict=True)
    ]

    def one_block(i, carry):
        loss_sum, correct_sum, (d_hidden, d_kernel) = carry
        block = _Block.at(i, columns, hidden, targets, counts)
        loss, correct, d_logits = block.forward(kernel, tensor)
        d_logits = d_logits.astype(kernel.dtype)
        if d_hidden is not None:
            d_block = product("BTv,Dv->BTD", d_logits, kernel)
            d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, d_block, i * columns, axis=1)
        if d_kernel is not None:
            d_kernel += product("BTD,BTv->Dv", block.hidden.astype(kernel.dtype), d_logits)
        return loss_sum + loss, correct_sum + correct, [d_hidden, d_kernel]

    zero = jnp.zeros((), jnp.float32)
    loss_sum, correct, gradients = jax.lax.fori_loop(
        0, n_blocks, one_block, (zero, zero, gradients)
    )
    return (loss_sum, correct), gradients


class _Block(NamedTuple):
    """A block of columns: hidden [B, T, D], targets int32[B, T], valid bool[B, T]."""

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

    def forward(
        self, kernel: jax.Array, tensor: str | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the loss of a block and the gradient of its logits.

        Args:
          kernel: [D, v].
          tensor: mesh axis over which the vocabulary is sharded; None: it is not sharded.

        Returns:
          Loss sum float32[], number of correct tokens float32[], gradient float32[B, T, v].
        """

        def reduced(reduce, part: jax.Array) -> jax.Array:
            return part if tensor is None else reduce(part, tensor)

        logits = product("BTD,Dv->BTv", self.hidden.astype(kernel.dtype), kernel)
        first = 0 if tensor is None else jax.lax.axis_index(tensor) * kernel.shape[1]
        tokens = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        is_target = tokens == self.targets[..., None]
        chosen = jnp.sum(jnp.where(is_target, logits, 0), axis=-1, keepdims=True)
        chosen = reduced(jax.lax.psum, chosen)
        highest = reduced(jax.lax.pmax, jnp.max(logits, axis=-1, keepdims=True))
        exponentials = jnp.exp(logits - highest)
        total = reduced(jax.lax.psum, jnp.sum(exponentials, axis=-1, keepdims=True))
        losses = (jnp.log(total) + highest - chosen)[..., 0]
        as_high = reduced(jax.lax.psum, jnp.sum(logits >= chosen, axis=-1))
        best = as_high == 1  # only the target itself
        d_logits = exponentials / total - is_target
        return (
            jnp.sum(jnp.where(self.valid, losses, 0)),
            jnp.sum(self.valid & best, dtype=jnp.float32),
            jnp.where(self.valid[..., None], d_logits, 0),
        )


def _n_blocks(counts: jax.Array, columns: int) -> jax.Array:
    """int32[]: number of blocks that cover the supervised tokens of all rows."""
    return -(-jnp.max(counts) // columns)
