"""Muon for weight matrices, AdamW's direction for the rest.

Muon makes momentum orthogonal (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
networks"); its steps are scaled to the root mean square of Adam's (Liu et al. 2025, "Muon is
Scalable for LLM Training", Eq. 4), so that both share a learning rate.  Embedding, output head,
router, norms, biases and the position embedding have Adam's steps.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

RMS = 0.2  # of a step, as Adam's typically is

# Path -> (axes of inputs, axes of outputs), other axes stack matrices; None: Adam's.  The first
# match counts.
_AXES = (
    (r".*/(lm_head|gate)/kernel", None),
    (r"vision/patch_embed/kernel", ((0, 1, 2), (3,))),
    (r"adaptor/.*/kernel", ((0,), (1,))),
    (r".*/experts/\w+_proj", ((2,), (3,))),
    (r".*/attn/qkv/kernel", ((1,), (3, 4))),
    (r".*/(o_proj|attn/proj)/kernel", ((1, 2), (3,))),
    (r".*/(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj)/kernel", ((1,), (2, 3))),
    (r".*/kernel", ((1,), (2,))),
)


class MuonState(NamedTuple):
    """State by path: momenta of the matrices with a count, and what Adam keeps of the rest."""

    count: jax.Array
    momentum: dict[str, jax.Array]
    adam: optax.ScaleByAdamState


def matrix_axes(path: str) -> MuonDimensionNumbers | None:
    """Axes of inputs and outputs of a weight matrix; None for what Adam steps."""
    axes = _axes(path)
    return axes and MuonDimensionNumbers(*axes)


def _axes(path: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    return next((axes for pattern, axes in _AXES if re.fullmatch(pattern, path)), None)


def scale_by_muon_or_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon for matrices, Adam (b1, b2, eps) for the rest, over a flat dict by path.

    In place of `optax.scale_by_adam`: before weight decay and learning rate.
    """
    adam: Any = optax.scale_by_adam(b1, b2, eps)  # to Optax's types states are any trees
    muon: Any = scale_by_muon(weight_dimension_numbers=_all_axes)
    constants = muon.init({}).ns_coeffs  # no state: never rounded, never saved

    def init(params: Any) -> MuonState:
        matrices, rest = _split(params)
        state = muon.init(matrices)
        return MuonState(state.count, state.mu, adam.init(rest))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        matrices, rest = _split(updates)
        rest, adam_state = adam.update(rest, state.adam)
        before = optax.contrib.MuonState(state.count, state.momentum, constants)
        matrices, after = muon.update(matrices, before)
        steps = {path: step * _size(path, step.shape) for path, step in matrices.items()}
        return {**rest, **steps}, MuonState(after.count, after.mu, adam_state)

    return optax.GradientTransformation(init, update)


def _all_axes(matrices: Any) -> Any:
    return {path: matrix_axes(path) for path in matrices}


def _size(path: str, shape: tuple[int, ...]) -> float:
    """What gives an orthogonal matrix the root mean square `RMS`."""
    matrix = _axes(path)
    assert matrix is not None, path
    products = (math.prod(shape[axis] for axis in axes) for axes in matrix)
    return RMS * math.sqrt(max(products))


def _split(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is of matrices, and the rest."""
    matrices = {path: leaf for path, leaf in tree.items() if matrix_axes(path)}
    return matrices, {path: leaf for path, leaf in tree.items() if path not in matrices}
