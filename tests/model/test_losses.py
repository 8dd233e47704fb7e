"""The chunked loss against the plain loss: values, gradients, memory and flops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.model.losses import next_token_loss, shift_targets
from vl2jax.processing.batch import Batch
from vl2jax.training.chunked_loss import chunked_next_token_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, D, VOCAB = 3, 21, 10, 33


def _batch(rows=B, tokens=T, vocab=VOCAB, share=0.4, seed=0) -> Batch:
    """Random tokens, two sequences per row and padding; the last row has no supervised token."""
    random = np.random.default_rng(seed)
    segments = np.where(np.arange(tokens) < tokens // 2, 1, 2)[None].repeat(rows, 0)
    segments[:, -2:] = 0
    mask = random.random((rows, tokens)) < share
    mask[-1] = False
    return Batch(
        tiles=np.zeros((0, 2, 2, 3), np.uint8),
        tokens=random.integers(0, vocab, (rows, tokens)).astype(np.int32),
        image_index=np.full((rows, tokens), -1, np.int32),
        positions=np.zeros((rows, tokens), np.int32),
        segment_ids=segments.astype(np.int32),
        loss_mask=mask,
    )


def _inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (B, T, D), dtype), jax.random.normal(keys[1], (D, VOCAB))


def _plain(hidden, kernel, batch, weight=3.0):
    """Value and gradients of `weight` times the summed loss, from the logits of all tokens."""

    def loss(hidden, kernel):
        return weight * next_token_loss(hidden @ kernel, batch)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)


def _chunked(batch, chunk, dtype=jnp.float32, argnums=(0, 1), weight=3.0):
    def loss(hidden, kernel):
        sums = chunked_next_token_loss(hidden, kernel, batch, dtype=dtype, chunk=chunk)
        return weight * sums.loss_sum

    return jax.jit(jax.value_and_grad(loss, argnums=argnums))


def _assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("chunk", [1, 7, 12, 1000])
def test_equals_the_plain_loss(chunk):
    hidden, kernel = _inputs()
    batch = _batch()
    want, (want_hidden, want_kernel) = _plain(hidden, kernel, batch)
    got, (got_hidden, got_kernel) = _chunked(batch, chunk)(hidden, kernel)
    assert got == pytest.approx(float(want), rel=1e-6)
    _assert_close(got_hidden, want_hidden)
    _assert_close(got_kernel, want_kernel)
    _, mask = shift_targets(batch)
    assert np.abs(np.asarray(got_hidden)[np.asarray(mask)]).min() > 0
    assert not np.any(np.asarray(got_hidden)[~np.asarray(mask)])


def test_sums_without_gradients():
    hidden, kernel = _inputs()
    batch = _batch()
    targets, mask = shift_targets(batch)
    logits = hidden @ kernel
    right = (jnp.argmax(logits, axis=-1) == targets) & mask
    # Change the hidden state of one wrong token so that its prediction is correct.
    row, column = np.argwhere(np.asarray(mask & ~right))[0]
    direction = kernel[:, targets[row, column]]
    hidden = hidden.at[row, column].set(100 * direction / jnp.linalg.norm(direction))
    sums = jax.jit(lambda h, k: chunked_next_token_loss(h, k, batch, dtype=jnp.float32, chunk=8))(
        hidden, kernel
    )
    loss, count = next_token_loss(hidden @ kernel, batch)
    assert sums.loss_sum == pytest.approx(float(loss), rel=1e-6)
    assert sums.count == count == int(mask.sum())
    assert sums.correct == int(right.sum()) + 1


def test_equal_logits_are_not_correct():
    """If all logits are equal, no token counts as correct."""
    hidden, kernel = _inputs()
    sums = chunked_next_token_loss(hidden, kernel * 0, _batch(), dtype=jnp.float32)
    assert sums.count > 0
    assert sums.correct == 0
    assert sums.loss_sum == pytest.approx(float(sums.count) * np.log(VOCAB), rel=1e-6)


def test_nothing_supervised():
    hidden, kernel = _inputs()
    value, gradients = _chunked(_batch(share=0), 8)(hidden, kernel)
    assert value == 0
    assert not any(np.any(g) for g in gradients)


def test_bfloat16_products_keep_a_float32_kernel_gradient():
    hidden, kernel = _inputs(jnp.bfloat16)
    batch = _batch()
    want, (want_hidden, want_kernel) = _plain(hidden.astype(jnp.float32), kernel, batch)
    got, (got_hidden, got_kernel) = _chunked(batch, 9, jnp.bfloat16)(hidden, kernel)
    assert got_hidden.dtype == jnp.bfloat16
    assert got_kernel.dtype == jnp.float32
    assert got == pytest.approx(float(want), rel=1e-2)
    np.testing.assert_allclose(got_kernel, want_kernel, atol=0.02 * np.abs(want_kernel).max())
    np.testing.assert_allclose(
        got_hidden.astype(jnp.float32), want_hidden, atol=0.02 * np.abs(want_hidden).max()
    )
    assert np.any(got_kernel != got_kernel.astype(jnp.bfloat16).astype(jnp.float32))


@functools.cache
def _compiled(argnums, tokens=2048, vocab=129280, width=64):
    """Compiles for the size of the released vocabulary, without allocating arrays."""
    shape = jax.ShapeDtypeStruct
    batch = jax.tree.map(lambda a: shape(a.shape, a.dtype), _batch(2, tokens, vocab))

    def loss(hidden, kernel, batch):
        sums = chunked_next_token_loss(hidden, kernel, batch, dtype=jnp.float32, chunk=256)
        return sums.loss_sum

    function = jax.value_and_grad(loss, argnums=argnums) if argnums else loss
    inputs = shape((2, tokens, width), jnp.float32), shape((width, vocab), jnp.float32)
    return jax.jit(function).lower(*inputs, batch).compile()


def test_never_holds_the_logits_of_all_tokens():
    """The logits of 4096 tokens take 2.1 GB; those of a chunk of 256 tokens take 0.13 GB."""
    logits = 4 * 4096 * 129280
    for argnums in ((), (0, 1)):
        assert _compiled(argnums).memory_analysis().temp_size_in_bytes < logits / 4


def test_a_frozen_kernel_costs_no_gradient():
    """Three matrix products with the kernel's gradient, two without it, one with no gradient."""
    flops = [_compiled(argnums).cost_analysis()["flops"] for argnums in ((), (0,), (0, 1))]
    product = 2 * 256 * 64 * 129280  # `cost_analysis` counts a loop's body once
    assert flops[1] - flops[0] > 0.9 * product
    assert flops[2] - flops[1] == pytest.approx(product, rel=0.1)


def test_accumulates_in_a_scan():
    """Gradients summed in a scan over microbatches equal those of the whole batch."""
    hidden, kernel = _inputs()
    batch = _batch()
    _, (want_hidden, want_kernel) = _chunked(batch, 8)(hidden, kernel)

    def one(total, x):
        hidden, batch = jax.tree.map(lambda a: a[None], x)

        def loss(hidden, kernel):
            sums = chunked_next_token_loss(hidden, kernel, batch, dtype=jnp.float32, chunk=8)
            return 3 * sums.loss_sum

        d_hidden, d_kernel = jax.grad(loss, argnums=(0, 1))(hidden, kernel)
        return total + d_kernel, d_hidden[0]

    rows = batch.replace(tiles=np.zeros((B, 0)))
    got_kernel, got_hidden = jax.lax.scan(one, jnp.zeros_like(kernel), (hidden, rows))
    _assert_close(got_hidden, want_hidden)
    _assert_close(got_kernel, want_kernel)
