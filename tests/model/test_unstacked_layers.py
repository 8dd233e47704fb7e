"""Forms for decoding on CPU: layers apart, experts of few tokens, caches kept as bits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.steps import BURST, programs
from vl2jax.model import attention
from vl2jax.model.attention import init_cache
from vl2jax.model.decoder import init_caches
from vl2jax.model.unstacked_layers import are_apart, pays, take_apart
from vl2jax.model.vl2 import VL2
from vl2jax.ops.experts import cpu as experts_few
from vl2jax.ops.experts.xla import ExpertWeights, automatic, dense
from vl2jax.ops.platform import compiling_for

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _copy(tree):
    """New dicts and the same leaves."""
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _decode(net):
    return jax.jit(functools.partial(net.apply, method=VL2.decode))


def test_layers_apart_change_nothing(mini):
    """mini-extra has experts in two runs of layers, and a router's bias."""
    model = mini("mini-extra")
    cfg, stacked = model.config.decoder, model.params
    assert not are_apart(cfg, stacked)
    apart = take_apart(cfg, _copy(stacked))
    assert are_apart(cfg, apart)
    x = jax.random.normal(jax.random.key(0), (2, 5, cfg.hidden_size))
    positions = np.tile(np.arange(5), (2, 1))
    found = []
    for params, is_apart in ((stacked, False), (apart, True)):
        caches = init_caches(cfg, 2, 8, x.dtype, is_apart)
        decode = _decode(VL2(model.config, layers_apart=is_apart))
        found.append(decode(params, x, positions, caches))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
    number = 0
    for run in cfg.layer_runs:
        for layer in range(run.count):
            name, leaves = cfg.single_runs[number].name, jax.tree.leaves(found[0][1][run.name])
            for whole, one in zip(leaves, jax.tree.leaves(found[1][1][name]), strict=True):
                np.testing.assert_allclose(whole[layer], one[0], atol=1e-5)
            number += 1


def test_taking_apart_uses_the_stacks_up(mini):
    model = mini("mini-extra")
    params = _copy(model.params)
    names = [run.name for run in model.config.decoder.layer_runs]
    before = {name: params["params"]["decoder"][name] for name in names}
    assert take_apart(model.config.decoder, params) is params
    for name in names:
        assert params["params"]["decoder"][name] is not before[name]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(p)) for p in (params, model.params)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("tokens", "n_experts", "layers"), [(1, 8, 3), (2, 16, 1), (2, 16, 3)])
def test_experts_of_few_tokens(tokens, n_experts, layers):
    """Copies of the chosen experts, of one layer or out of many: as the oracle has it."""
    assert experts_few.serves(tokens, 2, n_experts)
    keys = jax.random.split(jax.random.key(tokens), 6)
    x = jax.random.normal(keys[0], (tokens, 8))
    weights = jax.random.uniform(keys[1], (tokens, 2))
    experts = jax.vmap(lambda key: jax.random.permutation(key, n_experts)[:2])(
        jax.random.split(keys[2], tokens)
    )
    shapes = ((8, 12), (8, 12), (12, 8))
    stacks = ExpertWeights(
        *(
            jax.random.normal(key, (layers * n_experts, *shape))
            for key, shape in zip(keys[3:], shapes, strict=True)
        )
    )
    first = (layers - 1) * n_experts
    form = jax.jit(functools.partial(automatic, first=first, n_experts=n_experts))
    got = form(x, weights, experts, stacks)
    want = jax.jit(dense)(x, weights, experts, jax.tree.map(lambda a: a[first:], stacks))
    np.testing.assert_allclose(got, want, atol=2e-4)
    low = [a.astype(jnp.bfloat16) for a in (x, *stacks)]
    got = form(low[0], weights, experts, ExpertWeights(*low[1:]))
    assert got.dtype == jnp.bfloat16
    scale = np.abs(want).max()
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.03 * scale)


def test_a_bfloat16_cache_is_kept_as_bits(mini):
    """It gives what a float32 cache of rounded values gives."""
    model = mini("mini-tiny")  # keys and values by heads
    assert pays(model.config.decoder, model.params)
    cfg = model.config.decoder
    assert {a.dtype.name for a in jax.tree.leaves(init_cache(cfg, 1, 1, 4, jnp.bfloat16))} == {
        "uint16"
    }
    x = jax.random.normal(jax.random.key(0), (2, 3, cfg.hidden_size))
    decode, found = _decode(VL2(model.config)), []
    for dtype in (jnp.bfloat16, jnp.float32):
        caches = init_caches(cfg, 2, 4, dtype)
        _, caches = decode(model.params, x, np.tile(np.arange(3), (2, 1)), caches)
        one, caches = decode(model.params, x[:, :1], np.array([[3], [3]]), caches)
        found.append((caches, one))
    for bits, values in zip(*(jax.tree.leaves(caches) for caches, _ in found), strict=True):
        values = values.view(jnp.float32)  # may be bits as well
        read = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_allclose(read, values, rtol=0.02, atol=0.02)
        assert np.abs(values[:, :, :, 3]).max() > 0
    np.testing.assert_allclose(found[0][1], found[1][1], atol=0.05 * np.abs(found[1][1]).max())


def test_a_float32_cache_is_not_copied_to_write_a_token(mini):
    """With layers apart: no copy of its size in a decoding step, whatever the version of jax."""
    model = mini("mini-tiny")
    cfg = model.config.decoder
    params = take_apart(cfg, _copy(model.params))
    steps = programs(model.config, jnp.dtype(jnp.float32), "cpu", None, True)
    state = jax.eval_shape(lambda: steps.idle(2, 48))
    arguments = (params, SamplingParams.create(), state, jnp.asarray([-1], jnp.int32), BURST, 0)
    text = steps.burst.trace(*arguments).lower().compile().as_text()
    cache = f"{cfg.num_attention_heads},48,{cfg.qk_head_dim}]"
    copies = [line for line in text.splitlines() if " copy(" in line and cache in line]
    assert not copies


@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_token_is_written_alike_everywhere(heads):
    """One per row, each at its own place: row by row on CPU, a scatter elsewhere."""
    stack, shape = jnp.zeros((2, 3, *heads, 4, 5)), (3, *heads, 1, 5)
    new = jnp.arange(1.0, math.prod(shape) + 1).reshape(shape)
    positions = jnp.array([[0], [2], [3]])
    here = attention._write(stack, 1, new, positions)
    with compiling_for("gpu"):
        elsewhere = attention._write(stack, 1, new, positions)
    np.testing.assert_array_equal(here, elsewhere)
    for row, slot in enumerate((0, 2, 3)):
        np.testing.assert_array_equal(here[1, row, ..., slot, :], new[row, ..., 0, :])
    assert np.count_nonzero(here) == new.size
