"""Weights of routed experts.

Axis legend: E experts, D width, F expert width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl2jax.ops.matmul import Weight, dequantize


class ExpertWeights(NamedTuple):
    """Weights of experts: gate and up [E, D, F], down [E, F, D]."""

    gate: Weight
    up: Weight
    down: Weight


def one_layer(
    w: ExpertWeights, first: jax.Array | int, n_experts: int, dtype: jnp.dtype
) -> ExpertWeights:
    """Slices one layer's experts from a stack of several layers and converts them to plain arrays.

    Args:
      w: weights of the experts of one or several layers.
      first: index of the layer's first expert.
      n_experts: number of experts of the layer, E.
      dtype: dtype of the result.
    """
    if n_experts < w.gate.shape[0]:
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=n_experts
        )
        w = ExpertWeights(*(jax.tree.map(cut, stack) for stack in w))
    return ExpertWeights(*(dequantize(stack, dtype) for stack in w))
