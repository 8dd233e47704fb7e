"""The blocked experts against the dense oracle: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.ops.experts import xla as experts

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, D, F, E, K = 37, 12, 8, 6, 3


def _case(routing: str, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 6)
    x = jax.random.normal(keys[0], (T, D), dtype)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = experts.ExpertWeights(
        *(jax.random.normal(k, s, dtype) / 3 for k, s in zip(keys[1:4], shapes, strict=True))
    )
    chosen = {
        "random": jax.lax.top_k(jax.random.normal(keys[4], (T, E)), K)[1],
        "empty": jax.lax.top_k(jax.random.normal(keys[4], (T, K)), K)[1] + 2,  # 2, 3, 4 alone
        "one": jnp.full((T, K), 4),  # all tokens on one expert, and that K times
    }[routing]
    return x, jax.nn.softmax(jax.random.normal(keys[5], (T, K))), chosen.astype(jnp.int32), weights


@pytest.mark.parametrize("block", [None, 1, 4, 64])
@pytest.mark.parametrize("routing", ["random", "empty", "one"])
def test_blocked_equals_dense(routing, block):
    x, weights, chosen, w = _case(routing)

    def loss(implementation, **options):
        def value(x, weights, w):
            y = implementation(x, weights, chosen, w, **options)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))

    (_, y), gradients = loss(experts.blocked, block=block)(x, weights, w)
    (_, y_dense), gradients_dense = loss(experts.dense)(x, weights, w)
    np.testing.assert_allclose(y, y_dense, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), gradients, gradients_dense
    )


def test_unused_experts_are_not_read():
    """NaN in the weights of experts without tokens stays out of values and gradients."""
    x, weights, chosen, w = _case("empty")
    used = sorted(set(np.ravel(chosen)))
    poisoned = jax.tree.map(
        lambda a: jnp.full_like(a, jnp.nan).at[np.array(used)].set(a[np.array(used)]), w
    )

    def total(w):
        return experts.blocked(x, weights, chosen, w).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(poisoned)
    assert np.isfinite(value)
    for leaf in gradient:
        unused = [e for e in range(E) if e not in used]
        assert not np.any(leaf[np.array(unused)])
        assert np.isfinite(leaf).all()


def test_single_token():
    x, weights, chosen, w = _case("random")
    got = experts.blocked(x[:1], weights[:1], chosen[:1], w)
    np.testing.assert_allclose(got, experts.dense(x[:1], weights[:1], chosen[:1], w), atol=1e-5)


def test_bfloat16_keeps_its_dtype():
    x, weights, chosen, w = _case("random", jnp.bfloat16)
    got = experts.blocked(x, weights, chosen, w)
    assert got.dtype == jnp.bfloat16
    want = experts.dense(
        *jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights)),
        chosen,
        jax.tree.map(lambda a: a.astype(jnp.float32), w),
    )
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.1)


@pytest.mark.parametrize(
    ("pairs", "n", "rows"), [(6, 64, 2), (48, 64, 2), (100, 64, 4), (192, 64, 4), (12288, 64, 128)]
)
def test_block_rows(pairs, n, rows):
    assert experts._block_rows(pairs, n) == rows


def test_experts_within_a_larger_stack():
    """Weights of several layers in one stack: the others are neither read nor given gradients."""
    x, weights, chosen, w = _case("random")
    stack = jax.tree.map(lambda a: jnp.concatenate([a * jnp.nan, a, a * jnp.nan]), w)

    def total(x, w, **where):
        return jnp.sin(experts.blocked(x, weights, chosen, w, **where)).sum()

    value, (dx, dw) = jax.value_and_grad(total, argnums=(0, 1))(x, w)
    where = {"first": jnp.int32(E), "n_experts": E}
    got, (dx_stack, dw_stack) = jax.value_and_grad(total, argnums=(0, 1))(x, stack, **where)
    assert got == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(dx_stack, dx, atol=1e-6)
    for whole, part in zip(dw_stack, dw, strict=True):
        np.testing.assert_allclose(whole[E : 2 * E], part, atol=1e-6)
        assert not np.any(whole[:E])
        assert not np.any(whole[2 * E :])
