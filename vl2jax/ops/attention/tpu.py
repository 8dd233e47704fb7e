"""Attention on TPU: JAX's splash attention kernel (flash attention with block-sparse masks).

Axis legend: B rows, T tokens, H heads, K query width, V value width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vl2jax.ops.attention.visibility import Visibility
from vl2jax.parallel.mesh import BATCH_AXES, dividing_axes, on_each_device

LANES = 128  # lengths and block sizes are multiples of it
MAX_BLOCK = 512


def unsupported(q, k, v, scale, visibility) -> str:
    """Supports self-attention of whole sequences: training, unchunked prefill, image tiles.

    float32 is rejected, because the kernel rounds float32 operands to bfloat16.
    """
    if q.dtype == jnp.float32:
        return "float32"
    if q.shape[:3] != k.shape[:3]:
        return "queries and keys are not the same tokens"
    return "" if q.shape[1] >= LANES else f"fewer than {LANES} tokens"


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None
) -> jax.Array:
    """Same arguments and result as `ops.attention.attention`."""
    return splash_attention(q, k, v, scale, None if visibility is None else visibility.q_segments)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    segments: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Self-attention by the splash attention kernels, forward and backward.

    Unlike in the other implementations, padding (segment 0) attends to earlier padding.  Callers
    ignore outputs at padding.

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      scale: factor of the scores.
      segments: int32[B, T]; attention is causal within a segment.  None: every query sees every
        key.
      interpret: whether to interpret the kernels, which works without a TPU but is slow.

    Returns:
      [B, T, H, V] in the dtype of v.
    """
    rows, length, heads, _ = q.shape
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    pad = -length % LANES
    q, k, v = (jnp.pad(a, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for a in (q, k, v))
    causal = segments is not None
    if causal:
        segments = jnp.pad(segments, ((0, 0), (0, pad)))
    else:  # the keys' padding gets a segment of its own, which no query sees
        segments = jnp.arange(length + pad) < length
        segments = jnp.broadcast_to(segments.astype(jnp.int32)[None], (rows, length + pad))

    def run(q, k, v, segments):
        _, heads, length, _ = q.shape
        return _kernel(heads, length, causal, interpret)(q, k, v, segments)

    row, head = dividing_axes(rows, *BATCH_AXES), dividing_axes(heads, "tensor")
    each = PartitionSpec(row, head)
    y = on_each_device(run, in_specs=(each, each, each, PartitionSpec(row)), out_specs=each)
    return y(q, k, v, segments)[:, :, :length].swapaxes(1, 2)


def _kernel(heads: int, length: int, causal: bool, interpret: bool):
    """Builds the kernel: (q, k, v [B, H, T, .], segments [B, T]) -> [B, H, T, V]."""
    # Imported here because importing Pallas is slow.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    block = next(b for b in range(MAX_BLOCK, 0, -LANES) if length % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    sizes = kernels.BlockSizes(**blocks)
    shape = (length, length)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids)))
