"""Attention: absorbed equals expanded, cached equals uncached, and masks hold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.config import DecoderConfig
from vl2jax.model.attention import MHA, MLA, Context, init_cache
from vl2jax.model.rope import rope_table

pytestmark = pytest.mark.usefixtures("quick_compilation")

MLA_CFG = DecoderConfig(
    hidden_size=24,
    num_attention_heads=3,
    kv_lora_rank=10,
    q_lora_rank=None,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    max_position_embeddings=64,
)
MHA_CFG = dataclasses.replace(MLA_CFG, use_mla=False, num_key_value_heads=3)


def _context(cfg, positions, segments=None):
    positions = jnp.asarray(positions, jnp.int32)
    segments = jnp.ones_like(positions) if segments is None else jnp.asarray(segments)
    return Context(positions, segments, *rope_table(cfg, positions, positions.shape[1]))


def _module(cfg, x, **options):
    """The compiled module, and parameters large enough that errors exceed the tolerance."""
    module = (MLA if cfg.use_mla else MHA)(cfg, **options)
    context = _context(cfg, jnp.zeros(x.shape[:2], jnp.int32))
    params = jax.jit(module.init)(jax.random.key(0), x, context, None, 0)
    return jax.jit(module.apply), jax.tree.map(lambda a: a * 20, params)


def _assert_close(got, want):
    """Within float32 rounding of the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("cfg", [MLA_CFG, MHA_CFG], ids=["mla", "mha"])
def test_cache_gives_what_the_whole_sequence_gives(cfg):
    """Prefills 5 tokens, then a chunk of 3, then decodes single tokens."""
    length = 11
    x = jax.random.normal(jax.random.key(1), (2, length, cfg.hidden_size))
    apply, params = _module(cfg, x)
    positions = np.tile(np.arange(length), (2, 1))
    whole, _ = apply(params, x, _context(cfg, positions), None, 0)
    cache = init_cache(cfg, 2, 2, 16, jnp.float32)
    for part in (slice(0, 5), slice(5, 8), *(slice(i, i + 1) for i in range(8, length))):
        context = _context(cfg, positions[:, part])
        y, cache = apply(params, x[:, part], context, cache, 1)
        _assert_close(y, whole[:, part])
    assert not any(
        np.any(leaf[0]) for leaf in jax.tree.leaves(cache)
    )  # the other layer is untouched


@pytest.mark.parametrize("tokens", [1, 4])
def test_absorbed_equals_expanded(tokens):
    x = jax.random.normal(jax.random.key(1), (2, 9, MLA_CFG.hidden_size))
    apply, params = _module(MLA_CFG, x)
    positions = np.tile(np.arange(9), (2, 1))
    cache = init_cache(MLA_CFG, 1, 2, 9, jnp.float32)
    before = 9 - tokens
    _, cache = apply(params, x[:, :before], _context(MLA_CFG, positions[:, :before]), cache, 0)
    context = _context(MLA_CFG, positions[:, before:])
    found = [
        jax.jit(MLA(MLA_CFG, absorb=absorb).apply)(params, x[:, before:], context, cache, 0)[0]
        for absorb in (True, False)
    ]
    _assert_close(found[0], found[1])
    assert np.abs(found[0]).max() > 0.1


def test_latent_cache_is_small():
    """The cache has C + R values per token and layer: 576 in the released models."""
    cache = init_cache(DecoderConfig(), 2, 1, 8, jnp.bfloat16)
    assert cache.latent.shape == (2, 1, 8, 576)


@pytest.mark.parametrize("cfg", [MLA_CFG, MHA_CFG], ids=["mla", "mha"])
def test_causal_and_segments(cfg):
    """A token's output depends only on itself and on earlier tokens of its sequence."""
    x = jax.random.normal(jax.random.key(2), (1, 7, cfg.hidden_size))
    apply, params = _module(cfg, x)
    positions, segments = [[0, 1, 2, 0, 1, 2, 3]], [[1, 1, 1, 2, 2, 2, 0]]
    context = _context(cfg, positions, segments)

    @jax.jit
    @jax.grad
    def sensitivity(x, t):
        return (apply(params, x, context, None, 0)[0][0, t] ** 2).sum()

    for t, seen in ((0, {0}), (2, {0, 1, 2}), (3, {3}), (5, {3, 4, 5})):
        gradient = np.abs(sensitivity(x, t)[0]).sum(axis=-1)
        assert set(np.flatnonzero(gradient > 1e-9)) == seen


def test_packed_equals_alone():
    x = jax.random.normal(jax.random.key(3), (1, 7, MLA_CFG.hidden_size))
    apply, params = _module(MLA_CFG, x)
    packed, _ = apply(
        params, x, _context(MLA_CFG, [[0, 1, 2, 0, 1, 2, 3]], [[1, 1, 1, 2, 2, 2, 2]]), None, 0
    )
    alone, _ = apply(params, x[:, 3:], _context(MLA_CFG, [[0, 1, 2, 3]]), None, 0)
    _assert_close(packed[:, 3:], alone)
