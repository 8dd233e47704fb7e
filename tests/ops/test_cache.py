"""KV cache: all implementations write the same, bits keep their values, nothing is copied."""

import functools
import math

import jax
import jax.numpy as jnp
import mesh_case
import numpy as np
import pytest

from vl2jax import ops
from vl2jax.model.attention import init_cache
from vl2jax.model.decoder import init_caches
from vl2jax.model.vl2 import VL2, abstract_params
from vl2jax.ops import cache

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _decode(net):
    return jax.jit(functools.partial(net.apply, method=VL2.decode))


@pytest.fixture(scope="module")
def by_heads():
    """A configuration with MHA, whose caches are keys and values by heads, and parameters."""
    config = mesh_case.architecture("mha")
    return config, jax.device_put(mesh_case.drawn(abstract_params(config), 0.15))


def test_a_bfloat16_cache_is_kept_as_bits(by_heads):
    """A cache of bits gives the results of a float32 cache, up to rounding."""
    config, params = by_heads
    cfg = config.decoder
    assert {a.dtype.name for a in jax.tree.leaves(init_cache(cfg, 1, 1, 4, jnp.bfloat16))} == {
        "uint16"
    }
    x = jax.random.normal(jax.random.key(0), (2, 3, cfg.hidden_size))
    decode, found = _decode(VL2(config)), []
    for dtype in (jnp.bfloat16, jnp.float32):
        caches = init_caches(cfg, 2, 4, dtype)
        _, caches = decode(params, x, np.tile(np.arange(3), (2, 1)), caches)
        one, caches = decode(params, x[:, :1], np.array([[3], [3]]), caches)
        found.append((caches, one))
    for bits, values in zip(*(jax.tree.leaves(caches) for caches, _ in found), strict=True):
        read = jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_allclose(read, values, rtol=0.02, atol=0.02)
        assert np.abs(values[:, :, :, 3]).max() > 0
    np.testing.assert_allclose(found[0][1], found[1][1], atol=0.05 * np.abs(found[1][1]).max())


@pytest.mark.parametrize("heads", [(), (2,)])
def test_a_token_is_written_alike_everywhere(heads):
    """Writes one token per row at different positions; writes beyond the last slot are dropped."""
    stack, shape = jnp.zeros((2, 3, *heads, 4, 5)), (3, *heads, 1, 5)
    new = jnp.arange(1.0, math.prod(shape) + 1).reshape(shape)
    positions = jnp.array([[0], [2], [3]])
    found = cache.write(stack, 1, new, positions)
    with ops.use(cache_write="reference"):
        want = cache.write(stack, 1, new, positions)
    np.testing.assert_array_equal(found, want)
    for row, slot in enumerate((0, 2, 3)):
        np.testing.assert_array_equal(found[1, row, ..., slot, :], new[row, ..., 0, :])
    assert np.count_nonzero(found) == new.size
    beyond = cache.write(found, 1, -new, positions + 4)
    np.testing.assert_array_equal(beyond, found)
