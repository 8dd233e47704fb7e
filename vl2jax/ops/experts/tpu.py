"""Routed experts on TPU: grouped matrix products over tokens sorted by expert.

Suffixes: T tokens, K experts per token, P = T * K pairs sorted by expert, E experts, D width,
F expert width.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.experts.sorting import by_expert
from vl2jax.ops.experts.tpu_chunked import CHUNKS, chunked_sum
from vl2jax.ops.experts.tpu_gmm import MAX_ROWS, grouped_ffn
from vl2jax.ops.experts.weights import ExpertWeights, one_layer
from vl2jax.ops.matmul import Int8
from vl2jax.parallel.mesh import axis_size, current_mesh

MIN_SPLIT = 4096  # pairs on a device from which on working in chunks pays


def refuses(x_TD, weights_TK, experts_TK, w, first=0, n_experts=None) -> str:
    """Few tokens with int8 weights, of which all of the layer's would be widened."""
    if isinstance(w.gate, Int8) and experts_TK.size < (n_experts or w.gate.shape[0]):
        return "few tokens, int8 weights"
    return ""


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
    """Tokens sorted by expert, then the grouped products of `tpu_gmm.py`: exact, for TPU.

    Where experts lie on several devices, `tpu_chunked.py` works off the pairs that are here.

    Args and result as of `ops.experts.routed_experts`.  The kernels take no int8: such weights are
    widened, those of all experts of the layer.
    """
    if isinstance(w.gate, Int8):
        w, first = one_layer(w, first, n_experts or w.gate.shape[0], x_TD.dtype), 0
    n_weights = w.gate.shape[0]
    n_experts = n_experts or n_weights
    mesh = current_mesh()
    places = 1 if mesh is None else axis_size(mesh, "expert")

    def place(group_sizes: jax.Array) -> jax.Array:
        """Within the weights of many layers."""
        if n_weights == n_experts:
            return group_sizes
        none = jnp.zeros(n_weights, group_sizes.dtype)
        return jax.lax.dynamic_update_slice(none, group_sizes, (first,))

    if chunk is None and places > 1 and experts_TK.size // places >= MIN_SPLIT:
        chunk = -(-experts_TK.size // (places * CHUNKS * MAX_ROWS)) * MAX_ROWS
    if chunk is not None:
        flat_P = experts_TK.reshape(-1)
        sizes = place(jnp.bincount(flat_P, length=n_experts))
        order_P = jnp.argsort(flat_P, stable=True)
        return chunked_sum(x_TD, weights_TK, order_P, sizes, w, chunk, n_experts, interpret)
    return by_expert(
        lambda x_PD, group_sizes: grouped_ffn(x_PD, w, place(group_sizes), n_experts, interpret),
        *(x_TD, weights_TK, experts_TK, n_experts),
    )
