"""The weights of a layer's routed experts.

Axis legend: E experts, D width, F expert width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul import Weight, widen


class ExpertWeights(NamedTuple):
    """Weights of all experts of a layer: gate and up [E, D, F], down [E, F, D]."""

    gate: Weight
    up: Weight
    down: Weight


def one_layer(
    w: ExpertWeights, first: jax.Array | int, n_experts: int, dtype: jnp.dtype
) -> ExpertWeights:
    """The experts of one layer out of a stack of many layers', as plain arrays of this dtype."""
    if n_experts < w.gate.shape[0]:
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=n_experts
        )
        w = ExpertWeights(*(jax.tree.map(cut, stack) for stack in w))
    return ExpertWeights(*(widen(stack, dtype) for stack in w))
