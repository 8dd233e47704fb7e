"""Unstacked layers: the same parameters as arrays of single layers, and the same answers."""

import functools

import jax
import numpy as np
import pytest

from vl2jax.model.decoder import init_caches
from vl2jax.model.unstacked_layers import are_unstacked, unstack_layers
from vl2jax.model.vl2 import VL2

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _copy(tree):
    """New dicts and the same leaves."""
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _decode(net):
    return jax.jit(functools.partial(net.apply, method=VL2.decode))


def test_unstacked_layers_change_nothing(mini):
    """mini-extra has experts in two runs of layers, and a router's bias."""
    model = mini("mini-extra")
    cfg, stacked = model.config.decoder, model.params
    assert not are_unstacked(cfg, stacked)
    unstacked = unstack_layers(cfg, _copy(stacked))
    assert are_unstacked(cfg, unstacked)
    x = jax.random.normal(jax.random.key(0), (2, 5, cfg.hidden_size))
    positions = np.tile(np.arange(5), (2, 1))
    found = []
    for params, is_unstacked in ((stacked, False), (unstacked, True)):
        caches = init_caches(cfg, 2, 8, x.dtype, is_unstacked)
        decode = _decode(VL2(model.config, unstacked_layers=is_unstacked))
        found.append(decode(params, x, positions, caches))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
    number = 0
    for run in cfg.layer_runs:
        for layer in range(run.count):
            name, leaves = cfg.unstacked_runs[number].name, jax.tree.leaves(found[0][1][run.name])
            for whole, one in zip(leaves, jax.tree.leaves(found[1][1][name]), strict=True):
                np.testing.assert_allclose(whole[layer], one[0], atol=1e-5)
            number += 1


def test_unstacking_uses_the_stacks_up(mini):
    model = mini("mini-extra")
    params = _copy(model.params)
    names = [run.name for run in model.config.decoder.layer_runs]
    before = {name: params["params"]["decoder"][name] for name in names}
    assert unstack_layers(model.config.decoder, params) is params
    for name in names:
        assert params["params"]["decoder"][name] is not before[name]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(p)) for p in (params, model.params)]
    assert sizes[0] == sizes[1]
