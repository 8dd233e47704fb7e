"""Muon for weight matrices, Adam for all other parameters.

Muon orthogonalises the momentum of each matrix (Jordan et al. 2024, "Muon: An optimizer for hidden
layers in neural networks").  Its updates are scaled to the typical RMS of Adam's updates (Liu et
al. 2025, "Muon is Scalable for LLM Training", Eq. 4), so that both use the same learning rate.
Adam updates the token embedding, the output head, the routers, norms, biases and the position
embedding.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

RMS = 0.2  # RMS of an update, typical of Adam

# (path, (input axes, output axes)): the other axes stack matrices.  The first match wins.  None, or
# no match: Adam.
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
    """State of Muon and Adam.

    Attributes:
      count: int32[], number of updates.
      momentum: momentum of the matrices, by path.
      adam: state of Adam for the other parameters.
    """

    count: jax.Array
    momentum: dict[str, jax.Array]
    adam: optax.ScaleByAdamState


def matrix_axes(path: str) -> MuonDimensionNumbers | None:
    """Input and output axes of a weight matrix; None if Adam updates the parameter."""
    axes = _axes(path)
    return axes and MuonDimensionNumbers(*axes)


def _axes(path: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    return next((axes for pattern, axes in _AXES if re.fullmatch(pattern, path)), None)


def scale_by_muon_or_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon for matrices, Adam for other parameters; use it in place of `optax.scale_by_adam`.

    Weight decay and learning rate are not included.

    Args:
      b1, b2, eps: parameters of Adam; Muon has the defaults of Optax.

    Returns:
      A transformation of flat dicts by path.
    """
    adam: Any = optax.scale_by_adam(b1, b2, eps)  # Optax types its states as any tree
    muon: Any = scale_by_muon(weight_dimension_numbers=_all_axes)
    constants = muon.init({}).ns_coeffs  # kept out of the state, so neither rounded nor saved

    def init(params: Any) -> MuonState:
        matrices, rest = _split(params)
        state = muon.init(matrices)
        return MuonState(state.count, state.mu, adam.init(rest))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        matrices, rest = _split(updates)
        rest, adam_state = adam.update(rest, state.adam)
        before = optax.contrib.MuonState(state.count, state.momentum, constants)
        with jax.default_matmul_precision("highest"):  # else bfloat16 on TPU, TF32 on GPU
            matrices, after = muon.update(matrices, before)
        scaled = {path: step * _scale(path, step.shape) for path, step in matrices.items()}
        return {**rest, **scaled}, MuonState(after.count, after.mu, adam_state)

    return optax.GradientTransformation(init, update)


def _all_axes(matrices: Any) -> Any:
    return {path: matrix_axes(path) for path in matrices}


def _scale(path: str, shape: tuple[int, ...]) -> float:
    """The factor that gives an orthogonal matrix an RMS of `RMS`."""
    matrix = _axes(path)
    assert matrix is not None, path
    products = (math.prod(shape[axis] for axis in axes) for axes in matrix)
    return RMS * math.sqrt(max(products))


def _split(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a flat dict into matrices and other parameters."""
    matrices = {path: leaf for path, leaf in tree.items() if matrix_axes(path)}
    return matrices, {path: leaf for path, leaf in tree.items() if path not in matrices}
