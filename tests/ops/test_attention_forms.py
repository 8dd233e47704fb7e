"""Attention against its reference implementation: values and gradients of all variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax import ops
from vl2jax.ops.attention import Visibility, attention, reference, xla
from vl2jax.ops.latent_attention import absorbed_attention

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _assert_close(got, want):
    """Within float32 rounding of the largest value."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_query_chunks_change_nothing():
    """Values and gradients, with padding and a length that the chunk size does not divide."""
    keys = jax.random.split(jax.random.key(4), 3)
    q, k, v = (jax.random.normal(key, (2, 50, 3, 8)) for key in keys)
    positions = jnp.tile(jnp.arange(50), (2, 1))
    segments = jnp.where(positions < 45, 1 + positions // 20, 0)
    see = Visibility(positions, segments, positions, segments)

    def run(chunk):
        def total(q, k, v):
            y = xla.attention(q, k, v, 0.3, see, lambda q, k, ordered: chunk)
            return (jnp.sin(y) * (segments > 0)[..., None, None]).sum(), y

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (_, whole), gradients = run(50)
    (_, chunked), gradients_chunked = run(16)
    real = np.asarray(segments) > 0
    _assert_close(chunked[real], whole[real])
    for a, b in zip(gradients_chunked, gradients, strict=True):
        _assert_close(a, b)


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [False, True, "ordered"])
def test_equals_reference(masked, shared, chunk):
    """Values and gradients, with keys wider than values."""
    keys = jax.random.split(jax.random.key(5), 3)
    heads = 1 if shared else 3
    q = jax.random.normal(keys[0], (2, 13, 3, 8))
    k = jax.random.normal(keys[1], (2, 13, heads, 8))
    v = jax.random.normal(keys[2], (2, 13, heads, 5))
    positions = jnp.tile(jnp.arange(13), (2, 1))
    segments = 1 + positions // 6
    see = Visibility(positions, segments, positions, segments, ordered=masked == "ordered")
    see = see if masked else None

    def run(implementation, *more):
        def total(q, k, v):
            return jnp.sin(implementation(q, k, v, 0.3, see, *more)).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    want, expected = run(reference.attention)
    for got, gradients in (run(xla.attention, lambda q, k, ordered: chunk), run(attention)):
        assert got == pytest.approx(float(want), rel=1e-5)
        for a, b in zip(gradients, expected, strict=True):
            _assert_close(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_one_query_per_row(heads, dtype):
    """A decoding step, with each row at a different position."""
    keys = jax.random.split(jax.random.key(6), 3)
    q = jax.random.normal(keys[0], (4, 1, 3, 8), dtype)
    k = jax.random.normal(keys[1], (4, 9, heads, 8), dtype)
    v = jax.random.normal(keys[2], (4, 9, heads, 5), dtype)
    slots = jnp.tile(jnp.arange(9), (4, 1))
    at = jnp.array([[8], [0], [3], [5]])
    see = Visibility(at, jnp.ones_like(at), slots, jnp.ones_like(slots))
    want = np.asarray(reference.attention(q, k, v, 0.3, see), np.float32)
    atol = 1e-5 if dtype == jnp.float32 else 2e-2
    for name in ("cpu", "xla"):
        with ops.use(attention=name):
            got = np.asarray(jax.jit(lambda *a: attention(*a, 0.3, see))(q, k, v), np.float32)
        np.testing.assert_allclose(got, want, atol=atol * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("rows", [1, 9])
def test_absorbed_equals_expanded(rows):
    """Every implementation of latent attention, with few and with many queries."""
    keys = jax.random.split(jax.random.key(7), 4)
    q_nope = jax.random.normal(keys[0], (rows, 1, 3, 6))
    q_rope = jax.random.normal(keys[1], (rows, 1, 3, 4))
    latent = jax.random.normal(keys[2], (rows, 12, 10 + 4))
    w_kv_b = jax.random.normal(keys[3], (10, 3, 6 + 5))
    slots = jnp.tile(jnp.arange(12), (rows, 1))
    at = (jnp.arange(rows)[:, None] * 5 + 2) % 12
    see = Visibility(at, jnp.ones_like(at), slots, jnp.ones_like(slots))
    found = {}
    for name in ("xla", "reference"):
        with ops.use(latent_attention=name):
            found[name] = absorbed_attention(q_nope, q_rope, latent, w_kv_b, 0.2, see)
    assert found["xla"].shape == (rows, 1, 3, 5)
    _assert_close(found["xla"], found["reference"])


def test_scores_do_not_outlive_a_step():
    """A gradient with 2048 tokens needs less than half of the memory of all scores in float32."""
    shape = jax.ShapeDtypeStruct((1, 2048, 8, 16), jnp.float32)
    total = jax.grad(lambda q, k, v: attention(q, k, v, 0.3).sum(), argnums=(0, 1, 2))
    memory = jax.jit(total).lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 8 * 2048 * 2048 / 2
