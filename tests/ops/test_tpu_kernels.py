"""The TPU kernels, interpreted on CPU, against the other implementations: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_case import E, case

from vl2jax.ops.attention import Visibility, attention
from vl2jax.ops.attention.tpu import splash_attention
from vl2jax.ops.experts.reference import dense
from vl2jax.ops.experts.tpu import gmm
from vl2jax.ops.experts.tpu_gmm import grouped_ffn, tile_columns, tile_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("routing", "chunk"), [("random", None), ("empty", None), ("one", 48), ("random", 32)]
)
def test_gmm_equals_dense(routing, chunk):
    """All pairs at once, and in chunks of which the last is partly empty."""
    x, weights, chosen, w = case(routing)

    def loss(implementation):
        def value(x, weights, w):
            y = implementation(x, weights, chosen, w)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    (_, y), gradients = loss(functools.partial(gmm, chunk=chunk, interpret=True))(x, weights, w)
    (_, y_dense), gradients_dense = loss(dense)(x, weights, w)
    np.testing.assert_allclose(y, y_dense, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), gradients, gradients_dense
    )


def test_rows_behind_the_last_group_are_zero():
    """Rows that belong to no expert, as in the receive buffer of an exchange, are not computed."""
    _, _, _, w = case("random")
    x = jax.random.normal(jax.random.key(0), (40, w.gate.shape[1]))
    sizes = jnp.array([3, 0, 20, 5, 0, 1], jnp.int32)

    def total(x):
        y = grouped_ffn(x.at[29:].set(jnp.nan), w, sizes, E, True)
        return jnp.sum(y), y

    (_, y), dx = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    assert np.isfinite(y).all() and np.isfinite(dx).all()
    assert np.abs(y[:29]).min(axis=1).all() and not np.any(y[29:])


def test_chunks_leave_out_what_belongs_to_no_expert():
    """Pairs with id E, as in a mostly empty buffer, add nothing and get no gradient."""
    x, weights, chosen, w = case("random")
    chosen = jnp.where(jnp.arange(len(x))[:, None] % 3 == 0, chosen, E)

    def total(x, weights, w, **options):
        return jnp.sum(jnp.sin(gmm(x, weights, chosen, w, interpret=True, **options)))

    def gradients(**options):
        return jax.jit(jax.value_and_grad(functools.partial(total, **options), (0, 1, 2)))

    whole, chunks = gradients()(x, weights, w), gradients(chunk=16)(x, weights, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, chunks)
    assert not np.any(chunks[1][0][1::3])


def test_gmm_within_a_larger_stack():
    x, weights, chosen, w = case("random")
    stack = jax.tree.map(lambda a: jnp.concatenate([a * jnp.nan, a, a * jnp.nan]), w)
    got = gmm(x, weights, chosen, stack, first=E, n_experts=E, interpret=True)
    np.testing.assert_allclose(got, dense(x, weights, chosen, w), atol=2e-5)


@pytest.mark.parametrize(("width", "value_width", "causal"), [(24, 16, True), (9, 9, False)])
def test_splash_equals_the_plain_form(width, value_width, causal):
    """Packed rows with padding, keys wider than values (MLA), and tiles without a mask."""
    length, padding, first = 150, 20, 90
    keys = jax.random.split(jax.random.key(0), 3)
    widths = (width, width, value_width)
    q, k, v = (
        jax.random.normal(key, (2, length, 2, n)) for key, n in zip(keys, widths, strict=True)
    )
    ids = np.repeat([1, 2, 0], [first, length - first - padding, padding])
    segments = jnp.asarray(np.stack([ids, ids]), jnp.int32)
    position = np.concatenate([np.arange(first), np.arange(length - first)])
    positions = jnp.asarray(np.stack([position, position]), jnp.int32)
    visibility = Visibility(positions, segments, positions, segments) if causal else None
    real = (segments > 0)[..., None, None] if causal else jnp.ones((1, 1, 1, 1))

    def loss(implementation):
        def value(q, k, v):
            y = implementation(q, k, v, width**-0.5) * real  # outputs at padding are unspecified
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    kernel = functools.partial(
        splash_attention, segments=segments if causal else None, interpret=True
    )
    (_, y), gradients = loss(kernel)(q, k, v)
    (_, want), wanted = loss(functools.partial(attention, visibility=visibility))(q, k, v)
    np.testing.assert_allclose(y, want, atol=2e-6)
    for gradient, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5)


def test_tiles():
    assert [tile_columns(n) for n in (896, 1280, 1408, 1536, 2048, 2560)] == [
        *(896, 640, 768, 768, 1024, 896)
    ]
    assert [tile_rows(*case) for case in ((48, 64), (24576, 64), (196608, 64))] == [16, 256, 512]
