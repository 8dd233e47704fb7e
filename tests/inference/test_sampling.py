"""Sampling against definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.common.errors import UserError
from vl2jax.inference.sampling import SamplingParams, next_token, process_logits


def _oracle(logits, seen, temperature, top_k, top_p, penalty):
    """Probabilities by the definitions of Hugging Face `generate`, in float64."""
    x = np.array(logits, np.float64)
    x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    x /= temperature
    if top_k:
        x[x < np.sort(x)[-top_k]] = -np.inf
    order = np.argsort(x)
    p = np.exp(x - x.max())
    p /= p.sum()
    drop = np.cumsum(p[order]) <= 1 - top_p
    drop[-1] = False
    p[order[drop]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "penalty"),
    [
        (1.0, 0, 1.0, 1.0),
        (0.5, 4, 1.0, 1.0),
        (1.3, 0, 0.7, 1.2),
        (0.8, 6, 0.9, 1.1),
        (1, 1, 0.01, 1),
    ],
)
def test_distribution(temperature, top_k, top_p, penalty):
    logits = np.array([2.0, 1.5, 1.4, 0.3, -0.2, -1.0, 0.9, 1.45])
    seen = np.array([1, 0, 0, 0, 1, 1, 0, 1], bool)
    want = _oracle(logits, seen, temperature, top_k, top_p, penalty)
    params = SamplingParams.create(temperature, top_k, top_p, penalty)
    got = process_logits(params, jnp.asarray(logits, jnp.float32)[None], jnp.asarray(seen)[None])
    np.testing.assert_allclose(jax.nn.softmax(got[0]), want, atol=1e-6)

    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1))
    tokens = jax.jit(next_token)(params, rows, jnp.tile(jnp.asarray(seen), (draws, 1)), keys)
    counts = np.bincount(tokens, minlength=8) / draws
    assert not counts[want == 0].any()
    assert np.abs(counts - want).max() < 4 * np.sqrt(0.25 / draws)


def test_greedy_takes_the_highest_after_the_penalty():
    logits = jnp.array([[1.0, 1.1, -0.5], [-1.0, -1.1, -3.0]])
    seen = jnp.array([[False, True, False], [True, False, False]])
    keys = jax.random.split(jax.random.key(0), 2)
    plain = next_token(SamplingParams.create(), logits, seen, keys)
    punished = next_token(SamplingParams.create(repetition_penalty=2.0), logits, seen, keys)
    assert plain.tolist() == [1, 0]
    assert punished.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_k", -2), ("top_p", 0), ("top_p", 1.5), ("repetition_penalty", 0)],
)
def test_ranges(name, value):
    with pytest.raises(UserError, match=name):
        SamplingParams.create(**{name: value})
