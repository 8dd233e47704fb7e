"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, "Muon: An optimizer for
hidden layers in neural networks"), with the root mean square of Adam's steps (Liu et al. 2025,
"Muon is Scalable for LLM Training", Eq. 4), so that both share a learning rate.

Weight matrices of hidden layers are updated so; everything else (embedding and output head, router,
norms, biases, the position embedding) has Adam's update.

Axis legend: S matrices of a stack, M inputs, N outputs.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MOMENTUM = 0.95
STEPS = 5  # of the iteration that makes singular values about 1
# Quintic whose repetition brings singular values from (0, 1] to about 1 (Jordan et al.).
_QUINTIC = 3.4445, -4.7750, 2.0315
_RMS = 0.2  # of an update, as Adam's typically is

# Path -> axes that stack matrices, axes of inputs, axes of outputs; the first match counts.
_AXES = (
    (r".*/(lm_head|gate)/kernel", None),
    (r"vision/patch_embed/kernel", ((), (0, 1, 2), (3,))),
    (r"adaptor/.*/kernel", ((), (0,), (1,))),
    (r".*/experts/\w+_proj", ((0, 1), (2,), (3,))),
    (r".*/attn/qkv/kernel", ((0, 2), (1,), (3, 4))),
    (r".*/(o_proj|attn/proj)/kernel", ((0,), (1, 2), (3,))),
    (r".*/(q_proj|k_proj|v_proj|q_b_proj|kv_b_proj)/kernel", ((0,), (1,), (2, 3))),
    (r".*/kernel", ((0,), (1,), (2,))),
)


class MuonState(NamedTuple):
    """State by path: momenta of the matrices, and what Adam keeps of the other parameters."""

    momentum: dict[str, jax.Array]
    adam: optax.ScaleByAdamState


def matrix_axes(path: str) -> tuple[tuple[int, ...], ...] | None:
    """Axes (of stacks, of inputs, of outputs) of a weight matrix; None for what Adam updates."""
    return next((axes for pattern, axes in _AXES if re.fullmatch(pattern, path)), None)


def scale_by_muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon for matrices, Adam (b1, b2, eps) for the rest, over a flat dict by path.

    In place of `optax.scale_by_adam`: before weight decay and learning rate.
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: Mapping[str, jax.Array]) -> MuonState:
        matrices, rest = _split(params)
        zeros = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in matrices.items()}
        return MuonState(zeros, adam.init(rest))

    def update(updates: Mapping[str, jax.Array], state: MuonState, params: Any = None):
        del params
        matrices, rest = _split(updates)
        rest, adam_state = adam.update(rest, state.adam)
        momentum = {
            path: MOMENTUM * state.momentum[path] + (1 - MOMENTUM) * gradient
            for path, gradient in matrices.items()
        }
        steps = {  # Nesterov's look ahead
            path: _step(path, MOMENTUM * momentum[path] + (1 - MOMENTUM) * gradient)
            for path, gradient in matrices.items()
        }
        return {**rest, **steps}, MuonState(momentum, adam_state)

    return optax.GradientTransformation(init, update)


def orthogonal(x: jax.Array) -> jax.Array:
    """[S, M, N] -> about U V^T of each matrix's singular value decomposition U s V^T."""
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.swapaxes(1, 2)
    x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-12
    a, b, c = _QUINTIC
    for _ in range(STEPS):
        square = jnp.einsum("SMN,SKN->SMK", x, x)
        x = a * x + jnp.einsum("SMK,SKN->SMN", b * square + c * square @ square, x)
    return x if wide else x.swapaxes(1, 2)


def _step(path: str, x: jax.Array) -> jax.Array:
    """The update of one parameter, of whatever shape, from its momentum."""
    stacks, inputs, outputs = matrix_axes(path)
    order = (*stacks, *inputs, *outputs)
    moved = x.transpose(order)
    m, n = (math.prod(x.shape[axis] for axis in axes) for axes in (inputs, outputs))
    y = orthogonal(moved.reshape(-1, m, n)) * (_RMS * math.sqrt(max(m, n)))
    back = sorted(range(x.ndim), key=lambda axis: order[axis])
    return y.reshape(moved.shape).transpose(back)


def _split(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is of matrices, and the rest."""
    matrices = {path: leaf for path, leaf in tree.items() if matrix_axes(path)}
    return matrices, {path: leaf for path, leaf in tree.items() if path not in matrices}
