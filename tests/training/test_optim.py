"""Schedules, AdamW against NumPy in float64, parts of the model, error messages."""

import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.checkpoints.model_dir import flatten
from vl2jax.common.errors import UserError
from vl2jax.training.optim import OptimConfig, learning_rate, make_optimizer, trained_paths

PATHS = {
    "vision/blocks/mlp/fc1/kernel": (3, 4),
    "vision/pos_embed": (5, 2),
    "adaptor/layers_0/bias": (4,),
    "decoder/embed_tokens/embedding": (7, 4),
    "decoder/moe_1/mlp/experts/gate_proj": (2, 3, 4, 2),
    "decoder/norm/scale": (4,),
    "image_newline": (4,),
}
DECAYED = {
    "vision/blocks/mlp/fc1/kernel",
    "decoder/embed_tokens/embedding",
    "decoder/moe_1/mlp/experts/gate_proj",
}


def test_schedules():
    def rates(steps=100, **kwargs):
        schedule = learning_rate(OptimConfig(lr=2.0, **kwargs), steps)
        return [float(schedule(count)) for count in range(steps)]

    constant = rates(schedule="constant", warmup_steps=4)
    assert constant[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0] and constant[-1] == 2.0
    step = rates(schedule="step")
    assert step[0] == step[49] == 2.0
    assert step[50] == step[74] == pytest.approx(2 / 10**0.5, rel=1e-6)
    assert step[75] == step[99] == pytest.approx(0.2, rel=1e-6)
    cosine = rates(schedule="cosine", warmup_steps=20, final_lr_fraction=0.1)
    assert cosine[19] == cosine[20] == 2.0
    assert cosine[60] == pytest.approx(1.1, rel=1e-6)  # halfway between 2 and 0.2
    assert cosine[99] == pytest.approx(0.2, rel=0.01) and min(cosine[20:]) == cosine[99]
    # A run may be shorter than its warm-up; the drops still depend on the steps of the run.
    short = rates(steps=4, schedule="step", warmup_steps=100)
    drops = 1, 1, 10**-0.5, 0.1
    assert short == pytest.approx([2 * n / 100 * drop for n, drop in enumerate(drops, 1)], rel=1e-5)
    assert rates(steps=2, schedule="cosine", warmup_steps=8) == pytest.approx([0.25, 0.5])
    assert rates(steps=1, schedule="cosine", warmup_steps=1) == [2.0]


def test_the_longest_part_decides():
    cfg = OptimConfig(
        lr=1.0,
        schedule="constant",
        weight_decay=0.0,
        lr_multipliers={"decoder": 0.5, "decoder/moe_1": 4.0, "image_newline": 2.0},
    )
    optimizer = make_optimizer(cfg, steps=1)
    params = {path: jnp.zeros(shape) for path, shape in PATHS.items()}
    grads = {path: jnp.ones(shape) for path, shape in PATHS.items()}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)  # Adam's first update is 1
    assert {path: round(-float(update.mean()), 4) for path, update in updates.items()} == {
        **{path: 1.0 for path in PATHS if not path.startswith(("decoder", "image"))},
        **{"decoder/embed_tokens/embedding": 0.5, "decoder/norm/scale": 0.5},
        **{"decoder/moe_1/mlp/experts/gate_proj": 4.0, "image_newline": 2.0},
    }


def test_paths_of_saved_states():
    """Existing checkpoints have these paths, so they must not change."""
    optimizer = make_optimizer(OptimConfig(lr=1.0, lr_multipliers={"vision": 0.1}), steps=9)
    state = optimizer.init({"vision/pos_embed": jnp.zeros(2)})
    assert {path: leaf.shape for path, leaf in flatten(state).items()} == {
        **{"1/count": (), "3/count": ()},
        **{"1/mu/vision/pos_embed": (2,), "1/nu/vision/pos_embed": (2,)},
    }


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("clipped", [True, False])
def test_adamw_against_numpy(moments, clipped):
    """Three steps of every group of parameters, with and without decay and clipping."""
    rng = np.random.default_rng(0)
    cfg = OptimConfig(
        lr=0.01,
        schedule="step",
        warmup_steps=2,
        clip_norm=1.0 if clipped else 1e6,
        moments_dtype=moments,
        lr_multipliers={"vision": 0.1, "decoder/moe_1": 3.0},
    )
    optimizer = make_optimizer(cfg, steps=4)
    params = {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in PATHS.items()
    }
    state = optimizer.init(params)
    oracle = {path: np.asarray(value, np.float64) for path, value in params.items()}
    mean, square = ({path: 0.0 for path in PATHS} for _ in range(2))
    for count in range(3):
        grads = {path: rng.normal(size=shape).astype(np.float32) for path, shape in PATHS.items()}
        updates, state = optimizer.update(
            {k: jnp.asarray(v) for k, v in grads.items()}, state, params
        )
        params = {path: params[path] + updates[path] for path in PATHS}
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        rate = 0.01 * [0.5, 1.0, 10**-0.5][count]
        for path, gradient in grads.items():
            g = gradient.astype(np.float64) * min(1, cfg.clip_norm / norm)
            mean[path] = 0.9 * mean[path] + 0.1 * g
            square[path] = 0.95 * square[path] + 0.05 * g * g
            unbiased = mean[path] / (1 - 0.9 ** (count + 1))
            scale = np.sqrt(square[path] / (1 - 0.95 ** (count + 1))) + 1e-8
            decay = 0.1 * oracle[path] if path in DECAYED else 0
            part = 0.1 if path.startswith("vision/") else 3.0 if "moe_1" in path else 1.0
            oracle[path] = oracle[path] - rate * part * (unbiased / scale + decay)
    # With bfloat16 moments, each of the three updates has a rounding error of about 2^-9.
    atol = 2e-6 if moments == "float32" else 3 * 0.03 * 3 * 2**-8
    for path, want in oracle.items():
        np.testing.assert_allclose(params[path], want, rtol=0, atol=atol, err_msg=path)
    kept = {leaf.dtype.name for leaf in _floats(state)}
    assert kept == {moments}


def _floats(tree):
    import jax

    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def test_parts():
    cfg = OptimConfig(lr=1.0, frozen=("decoder", "vision/pos_embed"))
    assert trained_paths(cfg, PATHS) == (
        "adaptor/layers_0/bias",
        "image_newline",
        "vision/blocks/mlp/fc1/kernel",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(frozen=("decoders",)), "did you mean 'decoder'"),
        (dict(frozen=("visio",)), "did you mean 'vision'"),
        (dict(lr_multipliers={"encoder": 0.1}), "'encoder', which has no parameter"),
        (dict(frozen=("vision", "adaptor", "decoder", "image_newline")), "nothing to train"),
    ],
)
def test_unknown_parts(fields, message):
    with pytest.raises(UserError, match=message):
        trained_paths(OptimConfig(lr=1.0, **fields), PATHS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(b2=0.999, moments_dtype="bfloat16"), r"optim.b2 is 0\.999, but moments in bfloat16"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(**{"lr": 1.0, **fields})
