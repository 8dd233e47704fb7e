"""Routed experts on TPU: grouped matrix products over tokens sorted by expert.

Suffixes: T tokens, K experts per token, P = T * K (token, expert) pairs sorted by expert,
E experts, D width, F expert width.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.experts.sorting import sorted_by_expert
from vl2jax.ops.experts.tpu_chunked import CHUNKS, chunked_sum
from vl2jax.ops.experts.tpu_gmm import MAX_ROWS, grouped_ffn
from vl2jax.ops.experts.weights import ExpertWeights
from vl2jax.ops.matmul import Int8
from vl2jax.parallel.mesh import axis_size, current_mesh

MIN_CHUNKED_PAIRS = 4096  # minimum number of pairs per device to compute in chunks


def unsupported(x_TD, weights_TK, experts_TK, w, first=0, n_experts=None) -> str:
    """Rejects float32, which the kernels round to bfloat16, and int8, which they do not take."""
    del weights_TK, experts_TK, first, n_experts
    if isinstance(w.gate, Int8):
        return "int8 weights"
    return "float32" if x_TD.dtype == jnp.float32 else ""


def gmm(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    w: ExpertWeights,
    first: jax.Array | int = 0,
    n_experts: int | None = None,
    chunk: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Sorts tokens by expert, then computes the grouped matrix products of `tpu_gmm.py`.

    If experts are on several devices and there are many pairs, `tpu_chunked.py` computes only the
    pairs of local experts, in chunks.

    Same arguments and result as `ops.experts.routed_experts`, besides:

    Args:
      chunk: pairs per chunk; None: chosen by the number of pairs.
      interpret: whether to interpret the kernels, which works without a TPU but is slow.
    """
    n_weights = w.gate.shape[0]
    n_experts = n_experts or n_weights
    mesh = current_mesh()
    n_shards = 1 if mesh is None else axis_size(mesh, "expert")

    def pad_sizes(group_sizes: jax.Array) -> jax.Array:
        """Pads the group sizes with zeros for the experts of other layers in w."""
        if n_weights == n_experts:
            return group_sizes
        zeros = jnp.zeros(n_weights, group_sizes.dtype)
        return jax.lax.dynamic_update_slice(zeros, group_sizes, (first,))

    if chunk is None and n_shards > 1 and experts_TK.size // n_shards >= MIN_CHUNKED_PAIRS:
        chunk = -(-experts_TK.size // (n_shards * CHUNKS * MAX_ROWS)) * MAX_ROWS
    if chunk is not None:
        flat_P = experts_TK.reshape(-1)
        sizes = pad_sizes(jnp.bincount(flat_P, length=n_experts))
        order_P = jnp.argsort(flat_P, stable=True)
        return chunked_sum(x_TD, weights_TK, order_P, sizes, w, chunk, n_experts, interpret)
    return sorted_by_expert(
        lambda x_PD, group_sizes: grouped_ffn(
            x_PD, w, pad_sizes(group_sizes), n_experts, interpret
        ),
        *(x_TD, weights_TK, experts_TK, n_experts),
    )
