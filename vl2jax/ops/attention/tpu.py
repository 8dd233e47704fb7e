"""Attention on TPU: the library's splash attention kernel, which never writes scores to memory.

Axis legend: B rows, T tokens, H heads, K query width, V value width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vl2jax.ops.attention.visibility import Visibility
from vl2jax.parallel.mesh import BATCH_AXES, dividing_axes, on_each_device

LANES = 128  # lengths and blocks are multiples of this
MAX_BLOCK = 512


def refuses(q, k, v, scale, visibility) -> str:
    """Whole sequences that attend to themselves (training, whole prefill, tiles) are served."""
    if q.shape[:3] != k.shape[:3]:
        return "queries and keys are not the same tokens"
    return "" if q.shape[1] >= LANES else f"fewer than {LANES} tokens"


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, visibility: Visibility | None
) -> jax.Array:
    """As `ops.attention.attention`."""
    return splash(q, k, v, scale, None if visibility is None else visibility.q_segments)


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    segments: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`softmax(q k^T scale) v`, softmax in float32, forward and backward as kernels.

    Unlike the other forms, padding (segment 0) attends to earlier padding: nobody looks at its
    result.

    Args:
      q, k: [B, T, H, K].
      v: [B, T, H, V].
      scale: multiplies the scores.
      segments: int32[B, T], attention is causal within one; None: every query sees every key.
      interpret: runs the kernels without a TPU, slowly.

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
    else:  # padding of the keys is another segment
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
    """(q, k, v [B, H, T, .], segments [B, T]) -> [B, H, T, V]."""
    # Imported where it is used: Pallas takes a while.
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
