"""Muon: which parameters are matrices, what a step does to them, and Adam for the rest."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vl2jax.checkpoint import flatten
from vl2jax.config import PRESETS
from vl2jax.model import abstract_params
from vl2jax.muon import MOMENTUM, matrix_axes, orthogonal, scale_by_muon
from vl2jax.optim import OptimConfig, make_optimizer


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_a_matrix_or_adams(name):
    """The axes of a matrix are all of its axes, once; its inputs are what it is multiplied with."""
    config = PRESETS[name]()
    width = config.decoder.hidden_size
    matrices = 0
    for path, leaf in flatten(abstract_params(config)["params"]).items():
        axes = matrix_axes(path)
        if axes is None:
            assert leaf.ndim < 3 or path.endswith(("gate/kernel", "bias", "scale")), path
            continue
        stacks, inputs, outputs = axes
        assert sorted((*stacks, *inputs, *outputs)) == list(range(leaf.ndim)), path
        if path.endswith(("o_proj/kernel", "down_proj/kernel", "down_proj")):
            assert math.prod(leaf.shape[axis] for axis in outputs) == width, path
        if path.endswith(("gate_proj", "up_proj/kernel", "q_proj/kernel", "kv_a_proj/kernel")):
            assert math.prod(leaf.shape[axis] for axis in inputs) == width, path
        matrices += 1
    assert matrices >= 15
    for path in ("decoder/lm_head/kernel", "decoder/embed_tokens/embedding", "vision/pos_embed"):
        assert matrix_axes(path) is None


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 12, 12)])
def test_orthogonal_has_singular_values_of_about_one(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 1e-3
    y = np.asarray(orthogonal(jnp.asarray(x)))
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(y, u @ v, atol=0.3)
    inside = np.swapaxes(u, 1, 2) @ y @ np.swapaxes(v, 1, 2)  # diagonal: the directions are kept
    diagonal = np.diagonal(inside, axis1=1, axis2=2)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    np.testing.assert_allclose(inside, diagonal[..., None] * np.eye(min(shape[1:])), atol=1e-4)


def test_a_step_of_matrices_and_of_the_rest():
    rng = np.random.default_rng(1)
    shapes = {
        "decoder/moe_1/self_attn/o_proj/kernel": (2, 3, 4, 6),
        "decoder/moe_1/mlp/experts/up_proj": (2, 3, 4, 6),
        "decoder/lm_head/kernel": (6, 9),
        "decoder/norm/scale": (6,),
    }

    def draw():
        return {
            path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()
        }

    muon, adam = scale_by_muon(0.9, 0.95, 1e-8), optax.scale_by_adam(0.9, 0.95, 1e-8)
    first, second = draw(), draw()
    state, other = muon.init(first), adam.init(first)
    for grads in (first, second):
        updates, state = muon.update(grads, state)
        expected, other = adam.update(grads, other)
    for path in ("decoder/lm_head/kernel", "decoder/norm/scale"):
        np.testing.assert_array_equal(updates[path], expected[path])

    for path, shape in (
        ("decoder/moe_1/self_attn/o_proj/kernel", (2, 12, 6)),
        ("decoder/moe_1/mlp/experts/up_proj", (6, 4, 6)),
    ):
        a, b = (np.asarray(grads[path], np.float64).reshape(shape) for grads in (first, second))
        momentum = MOMENTUM * (1 - MOMENTUM) * a + (1 - MOMENTUM) * b
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * b
        want = orthogonal(jnp.asarray(ahead, jnp.float32)) * 0.2 * max(shape[1:]) ** 0.5
        np.testing.assert_allclose(updates[path].reshape(shape), want, atol=1e-5)
        assert 0.1 < float(jnp.sqrt(jnp.mean(updates[path] ** 2))) < 0.25  # as Adam's steps


def test_muon_is_an_algorithm_of_the_optimizer():
    """Decay, learning rate and multipliers are those of AdamW; moments can be bfloat16."""
    fc1 = "vision/blocks/mlp/fc1/kernel"
    params = {fc1: jnp.full((1, 4, 4), 2.0), "image_newline": jnp.ones(4)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    cfg = OptimConfig(
        lr=0.5,
        algorithm="muon",
        schedule="constant",
        moments_dtype="bfloat16",
        lr_multipliers={"vision": 0.1},
    )
    optimizer = make_optimizer(cfg, steps=2)
    state = optimizer.init(params)
    updates, state = optimizer.update(zeros, state, params)
    np.testing.assert_allclose(updates[fc1], -0.5 * 0.1 * 0.1 * 2.0)
    np.testing.assert_array_equal(updates["image_newline"], 0)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {"bfloat16"}
