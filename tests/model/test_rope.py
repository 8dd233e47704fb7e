"""RoPE tables and rotations against those of the original."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.config import DecoderConfig, RopeScaling
from vl2jax.model.rope import (
    apply_rope,
    inverse_frequencies,
    rope_table,
    softmax_scale,
    yarn_mscale,
)

_KINDS = {
    "DeepseekV2LinearScalingRotaryEmbedding": "linear",
    "DeepseekV2DynamicNTKScalingRotaryEmbedding": "dynamic",
    "DeepseekV2YarnRotaryEmbedding": "yarn",
}


def _config(fields) -> DecoderConfig:
    scaling = None
    if fields["class"] in _KINDS:
        names = {field.name for field in dataclasses.fields(RopeScaling)}
        kept = {name: value for name, value in fields.items() if name in names}
        scaling = RopeScaling(type=_KINDS[fields["class"]], factor=fields["scaling_factor"], **kept)
    return DecoderConfig(
        qk_rope_head_dim=fields["dim"],
        max_position_embeddings=fields["max_position_embeddings"],
        rope_theta=fields["base"],
        rope_scaling=scaling,
    )


def _check(arrays, key, cfg, length):
    cos, sin = rope_table(cfg, jnp.arange(length)[None], length)
    half = cfg.qk_rope_head_dim // 2
    found = {name: x for name, x in (("cos", cos), ("sin", sin)) if f"{key}/{name}" in arrays}
    assert found
    for name, got in found.items():
        want = arrays[f"{key}/{name}"]
        np.testing.assert_array_equal(want[:, :half], want[:, half:])
        np.testing.assert_allclose(got[0], want[:, :half], atol=2e-6 * max(1, length / 16))


def test_golden_tables(data_dir):
    cases = json.loads((data_dir / "rope.json").read_text())
    arrays = np.load(data_dir / "rope.npz")
    checked = 0
    for name, fields in cases.items():
        if "class" not in fields:
            continue
        cfg = _config(fields)
        for length in fields["seq_lens"]:
            _check(arrays, f"{name}/{length}", cfg, length)
            want = arrays[f"{name}/{length}/inv_freq"]
            if fields["class"] == "DeepseekV2LinearScalingRotaryEmbedding":
                want = (
                    want / fields["scaling_factor"]
                )  # the original divides positions instead of frequencies
            np.testing.assert_allclose(inverse_frequencies(cfg, length), want, rtol=3e-7)
            checked += 1
    assert checked >= 12


def test_dynamic_depends_on_this_length_alone(data_dir):
    """The original keeps the base of the longest sequence so far; `rope_table` has no state."""
    fields = json.loads((data_dir / "rope.json").read_text())["dynamic_16_f2"]
    cfg, arrays = _config(fields), np.load(data_dir / "rope.npz")
    _check(arrays, "dynamic_16_f2_sequence/0_40", cfg, 40)
    _check(arrays, "dynamic_16_f2_sequence/1_200", cfg, 200)
    _check(arrays, "dynamic_16_f2/64", cfg, 64)


def test_interleaved_rotation(data_dir):
    arrays = np.load(data_dir / "rope.npz")
    cfg = DecoderConfig(qk_rope_head_dim=8)
    cos, sin = rope_table(cfg, jnp.asarray(arrays["apply/position_ids"]), 0)
    for part in "qk":
        x = jnp.asarray(arrays[f"apply/{part}"]).swapaxes(1, 2)
        got = apply_rope(x, cos, sin, interleaved=True).swapaxes(1, 2)
        np.testing.assert_allclose(got, arrays[f"apply/{part}_rot"], atol=2e-6)


def test_half_split_rotation_turns_pairs():
    cfg = DecoderConfig(qk_rope_head_dim=4)
    cos, sin = rope_table(cfg, jnp.array([[3]]), 0)
    x = jnp.array([[[[1.0, 2.0, 5.0, 7.0]]]])
    got = apply_rope(x, cos, sin, interleaved=False)[0, 0, 0]
    for i, (first, second) in enumerate(((1.0, 5.0), (2.0, 7.0))):
        angle = 3 * 10000 ** (-i / 2)
        turned = complex(first, second) * np.exp(1j * angle)
        assert got[i] == pytest.approx(turned.real, abs=1e-6)
        assert got[i + 2] == pytest.approx(turned.imag, abs=1e-6)


def test_angles_are_float32_in_bfloat16_models():
    """4096 positions have different angles; in bfloat16 only 769 would differ."""
    cfg = DecoderConfig(qk_rope_head_dim=64)
    cos, sin = rope_table(cfg, jnp.arange(4096)[None], 0)
    assert cos.dtype == jnp.float32
    assert len(np.unique(np.concatenate([cos[0], sin[0]], axis=-1), axis=0)) == 4096
    exact = np.cos(4095 * 10000.0 ** -(np.arange(32) / 32))
    np.testing.assert_allclose(cos[0, 4095], exact, atol=3e-4)


def test_softmax_scale(data_dir):
    golden = json.loads((data_dir / "rope.json").read_text())["softmax_scale_mscale"]
    for key, want in golden.items():
        factor, mscale = map(float, key.split("|"))
        assert yarn_mscale(factor, mscale) == pytest.approx(want)
    scaling = RopeScaling(type="yarn", factor=4, mscale_all_dim=0.8)
    cfg = DecoderConfig(rope_scaling=scaling)
    assert softmax_scale(cfg) == pytest.approx(192**-0.5 * 1.1109035488895913**2)
    assert softmax_scale(DecoderConfig()) == pytest.approx(192**-0.5)
