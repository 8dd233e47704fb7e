"""Muon: which parameters are matrices, their updates, and Adam for the other parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vl2jax.checkpoints.model_dir import flatten
from vl2jax.config import PRESETS
from vl2jax.model.vl2 import abstract_params
from vl2jax.training.muon import RMS, matrix_axes, scale_by_muon_or_adam
from vl2jax.training.optim import OptimConfig, make_optimizer
from vl2jax.training.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_a_matrix_or_adams(name):
    """The input and output axes of each matrix are correct; all other axes stack matrices."""
    config = PRESETS[name]()
    width = config.decoder.hidden_size
    matrices = 0
    for path, leaf in flatten(abstract_params(config)["params"]).items():
        axes = matrix_axes(path)
        if axes is None:
            assert leaf.ndim < 3 or path.endswith(("gate/kernel", "bias", "scale")), path
            continue
        inputs, outputs = (math.prod(leaf.shape[axis] for axis in part) for part in axes)
        stacked = {*range(leaf.ndim)} - {*axes.reduction_axis} - {*axes.output_axis}
        assert len(axes.reduction_axis) + len(axes.output_axis) + len(stacked) == leaf.ndim, path
        if path.startswith("decoder"):
            assert stacked == ({0, 1} if "/experts/" in path else {0}), path
        if path.endswith(("o_proj/kernel", "down_proj/kernel", "down_proj")):
            assert outputs == width, path
        if path.endswith(("gate_proj", "up_proj/kernel", "q_proj/kernel", "kv_a_proj/kernel")):
            assert inputs == width, path
        matrices += 1
    assert matrices >= 15
    for path in ("decoder/lm_head/kernel", "decoder/embed_tokens/embedding", "vision/pos_embed"):
        assert matrix_axes(path) is None


def test_a_step_of_matrices_and_of_the_rest():
    """Each matrix of a stack is orthogonalised approximately and scaled to the RMS of Adam."""
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

    muon, adam = scale_by_muon_or_adam(0.9, 0.95, 1e-8), optax.scale_by_adam(0.9, 0.95, 1e-8)
    grads = [draw(), draw()]
    state, other = muon.init(grads[0]), adam.init(grads[0])
    for gradient in grads:
        updates, state = muon.update(gradient, state)
        expected, other = adam.update(gradient, other)
    for path in ("decoder/lm_head/kernel", "decoder/norm/scale"):
        np.testing.assert_array_equal(updates[path], expected[path])

    for path, shape in (
        ("decoder/moe_1/self_attn/o_proj/kernel", (2, 12, 6)),
        ("decoder/moe_1/mlp/experts/up_proj", (6, 4, 6)),
    ):
        first, second = (np.asarray(g[path], np.float64).reshape(shape) for g in grads)
        # Nesterov momentum 0.95 with bias correction.
        momentum = (0.95 * 0.05 * first + 0.05 * second) / (1 - 0.95**3)
        ahead = 0.95 * momentum + 0.05 * second / (1 - 0.95**2)
        u, _, v = np.linalg.svd(ahead, full_matrices=False)
        step = np.asarray(updates[path]).reshape(shape) / (RMS * max(shape[1:]) ** 0.5)
        inside = np.swapaxes(u, 1, 2) @ step @ np.swapaxes(v, 1, 2)
        diagonal = np.diagonal(inside, axis1=1, axis2=2)  # singular values
        assert diagonal.min() > 0.6 and diagonal.max() < 1.3
        off = inside - diagonal[..., None] * np.eye(diagonal.shape[1])
        np.testing.assert_allclose(off, 0, atol=1e-4)
        assert 0.1 < float(jnp.sqrt(jnp.mean(updates[path] ** 2))) < 0.25


def test_muon_is_an_algorithm_of_the_optimizer():
    """Weight decay, learning rate and multipliers apply to Muon, too; moments can be bfloat16."""
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


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, moments):
    """The saved state is sufficient for the next steps."""
    rng = np.random.default_rng(2)
    shapes = {
        "decoder/moe_1/mlp/experts/up_proj": (2, 3, 4, 6),
        "decoder/lm_head/kernel": (6, 9),
        "decoder/norm/scale": (6,),
    }
    params = {path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()}
    cfg = OptimConfig(lr=0.1, algorithm="muon", warmup_steps=3, moments_dtype=moments)
    optimizer = make_optimizer(cfg, steps=8)

    @jax.jit
    def step(params, state):
        gradients = jax.tree.map(lambda x: jnp.sin(3 * x), params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def steps(n, *now):
        for _ in range(n):
            now = step(*now)
        return now

    saved = steps(3, params, optimizer.init(params))
    like_params, like_state = jax.eval_shape(lambda: (params, optimizer.init(params)))
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        workdir.save(3, params=saved[0], opt_state=saved[1], data_state={})
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        found = workdir.restore(like_params=like_params, like_opt_state=like_state)[1:3]
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    want, fresh = steps(3, *saved), steps(3, saved[0], optimizer.init(params))
    for got, expected in zip(jax.tree.leaves(steps(3, *found)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, expected)
    for path in shapes:  # a fresh state gives other results
        assert np.any(fresh[0][path] != want[0][path])
