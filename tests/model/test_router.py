"""The router against the original router, and where it deliberately differs from it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.config import DecoderConfig
from vl2jax.model.losses import batch_balance_loss, expert_load, sequence_balance_loss
from vl2jax.model.moe import route


def _cases(data_dir):
    return json.loads((data_dir / "gate.json").read_text()), np.load(data_dir / "gate.npz")


def _config(fields) -> DecoderConfig:
    known = {field.name for field in dataclasses.fields(DecoderConfig)}
    return DecoderConfig(**{name: value for name, value in fields.items() if name in known})


def _by_expert(routing):
    order = np.argsort(routing.experts, axis=-1)
    return [
        np.take_along_axis(np.asarray(x), order, -1) for x in (routing.experts, routing.weights)
    ]


def test_golden_cases(data_dir):
    cases, arrays = _cases(data_dir)
    for name, fields in cases.items():
        cfg = _config(fields)
        x, weight = (jnp.asarray(arrays[f"{name}/{part}"]) for part in ("x", "weight"))
        key = f"{name}/e_score_correction_bias"
        bias = jnp.asarray(arrays[key]) if key in arrays else None
        routing = route(cfg, jnp.einsum("BTD,ED->BTE", x, weight), bias)
        experts, weights = _by_expert(routing)
        np.testing.assert_array_equal(experts, arrays[f"{name}/topk_idx"], err_msg=name)
        np.testing.assert_allclose(weights, arrays[f"{name}/topk_weight"], rtol=2e-5, atol=1e-6)
        if fields["aux_loss"] is not None:
            ones = jnp.ones(x.shape[:2], jnp.int32)
            loss = (
                sequence_balance_loss(routing.scores, routing.experts, ones)
                if cfg.seq_aux
                else batch_balance_loss(routing.scores, routing.experts, ones > 0)
            )
            assert loss * cfg.aux_loss_alpha == pytest.approx(fields["aux_loss"], rel=1e-5), name
    assert len(cases) > 10


def test_padding_does_not_count():
    """Padding changes neither loss nor load; each packed sequence has a loss of its own."""
    key = jax.random.key(0)
    scores = jax.nn.softmax(jax.random.normal(key, (1, 9, 4)))
    experts = jax.lax.top_k(scores, 2)[1]
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    packed = sequence_balance_loss(scores, experts, segments, max_segments=2)
    parts = [
        sequence_balance_loss(scores[:, part], experts[:, part], jnp.ones((1, n), jnp.int32))
        for part, n in ((slice(0, 4), 4), (slice(4, 7), 3))
    ]
    np.testing.assert_allclose(packed, (parts[0] + parts[1]) / 2, rtol=1e-6)
    changed = scores.at[:, 7:].set(0.9)
    again = sequence_balance_loss(changed, experts, segments, max_segments=2)
    np.testing.assert_allclose(again, packed, rtol=1e-6)
    load = expert_load(experts, segments > 0, 4)
    assert load.sum() == 14
    assert load.tolist() == np.bincount(np.ravel(experts[:, :7]), minlength=4).tolist()


def test_no_supervised_sequence_is_finite():
    nothing = jnp.zeros((1, 3), jnp.int32)
    loss = sequence_balance_loss(jnp.ones((1, 3, 4)), jnp.zeros((1, 3, 2), jnp.int32), nothing)
    assert loss == 0


def test_correction_bias_chooses_but_does_not_weigh():
    cfg = DecoderConfig(
        n_routed_experts=4,
        num_experts_per_tok=2,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
    )
    logits = jnp.array([[[2.0, 1.0, 0.0, -1.0]]])
    routing = route(cfg, logits, jnp.array([0.0, 0.0, 0.0, 10.0]))
    assert set(np.ravel(routing.experts)) == {0, 3}
    sigmoid = 1 / (1 + np.exp(-np.array([2.0, -1.0])))
    want = dict(zip((0, 3), 2 * sigmoid / sigmoid.sum(), strict=True))
    for expert, weight in zip(np.ravel(routing.experts), np.ravel(routing.weights), strict=True):
        assert weight == pytest.approx(want[int(expert)], rel=1e-6)


def test_rejected_groups_never_win():
    """All biased scores of the chosen group are negative.

    The original masks rejected groups with 0 and would choose experts from them.
    """
    cfg = DecoderConfig(
        n_routed_experts=6,
        num_experts_per_tok=2,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_group=3,
        topk_group=1,
    )
    bias = jnp.array([-3.0, -3.0, -2.0, -2.0, -4.0, -4.0])
    routing = route(cfg, jnp.zeros((1, 1, 6)), bias)
    assert set(np.ravel(routing.experts)) == {2, 3}
