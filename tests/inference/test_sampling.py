"""Sampling against definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.common.errors import UserError
from vl2jax.inference.sampling import (
    CANDIDATES,
    SEARCH,
    SamplingParams,
    make_keys,
    next_token,
    process_logits,
    truncate,
)
from vl2jax.parallel.mesh import AXES, BATCH_AXES
from vl2jax.parallel.sharding import make_mesh
from vl2jax.plan.hlo_text import parse

VOCAB = 1000  # more than the candidates, so that the search is tested


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


def _kept(logits, top_k, top_p):
    """Tokens that top-k and then top-p keep, in float64; of ties, lower ids come first."""
    x = np.array(logits, np.float64)
    if 0 < top_k < len(x):
        x[x < np.sort(x)[-top_k]] = -np.inf
    p = np.exp(x - x.max())
    order = np.argsort(-x, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    kept = np.isfinite(x)
    if top_p < 1:
        # A rounded sum may end one token earlier or later; the tests avoid such sums.
        kept[order[before >= top_p * p.sum()]] = False
    return kept


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


def _rows():
    """Rows with peaked, flat, tied, negative and mixed logits, float32[7, VOCAB]."""
    dice = np.random.default_rng(0)
    normal = dice.normal(size=VOCAB)
    rows = [8 * normal, normal, np.round(2 * normal), np.zeros(VOCAB), -np.abs(normal) - 50]
    rows += [np.where(normal > 1, 3.0, np.where(normal > 0, -0.0, 0.0)), np.arange(VOCAB) % 2 * 1.0]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 5, CANDIDATES, CANDIDATES + 1, 500, VOCAB, 10**15])
@pytest.mark.parametrize("top_p", [1.0, 0.9983, 0.9017, 0.5011, 1e-3, 1e-9])
def test_kept_tokens(top_k, top_p):
    """Candidates and search keep exactly the tokens of the definition, ties included."""
    rows = _rows()
    params = SamplingParams.create(1.0, top_k, top_p)
    got = jax.jit(process_logits)(params, jnp.asarray(rows), jnp.zeros(rows.shape, bool))
    for row, found in zip(rows, np.asarray(got), strict=True):
        np.testing.assert_array_equal(found > -np.inf, _kept(row, top_k, top_p))
        np.testing.assert_array_equal(found[found > -np.inf], row[found > -np.inf])


def test_rows_do_not_depend_on_others():
    """A row gives the same whether or not another row makes the search run."""
    rows = jnp.asarray(_rows())
    cut = jax.jit(truncate)
    together = cut(rows, 0, 0.9017)
    for i in range(len(rows)):
        active = jnp.arange(len(rows)) == i
        np.testing.assert_array_equal(cut(rows, 0, 0.9017, active)[i], together[i])


@pytest.mark.parametrize("axes", [{"data": 8}, {"expert": 2, "tensor": 4}])
def test_same_on_a_mesh(axes):
    """Rows and vocabulary may be split; the branch of the search sends nothing."""
    mesh = make_mesh(dict.fromkeys(AXES, 1) | axes, jax.devices())
    rows = jnp.asarray(np.resize(_rows(), (8, VOCAB)))
    params, seen = SamplingParams.create(1.3, 0, 0.97), jnp.zeros(rows.shape, bool)
    keys = jax.random.split(jax.random.key(0), 8)
    want = jax.jit(next_token)(params, rows, seen, keys)
    with jax.set_mesh(mesh):
        split = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(BATCH_AXES, "tensor")))
        program = jax.jit(next_token).lower(params, split, seen, keys).compile()
        got = program(params, split, seen, keys)
    np.testing.assert_array_equal(got, want)
    computations, entry = parse(program.as_text())
    assert len(computations) > 10
    for name, computation in computations.items():
        assert name == entry or not any(one.kind for one in computation.values())


def _lowered(params: SamplingParams) -> str:
    shape = jax.ShapeDtypeStruct
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    logits, seen = shape((2, VOCAB), jnp.float32), shape((2, VOCAB), jnp.bool_)
    traced = jax.jit(next_token).trace(params, logits, seen, keys)
    return traced.lower(lowering_platforms=("tpu",)).as_text(debug_info=True)


def test_no_sort():
    """Without top-k and top-p nothing is selected; with them once, and never by a sort."""
    plain = _lowered(SamplingParams.create(1.0, repetition_penalty=1.1))
    assert "stablehlo.sort" not in plain and "chlo.top_k" not in plain and SEARCH not in plain
    for options in ({"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9}):
        text = _lowered(SamplingParams.create(1.0, **options))
        assert text.count("chlo.top_k(") == 1, options
        assert "stablehlo.sort" not in text
        assert SEARCH in text
    assert "chlo.top_k" not in _lowered(SamplingParams.create(0.0, top_k=5, top_p=0.9))


def test_greedy_takes_the_highest_after_the_penalty():
    logits = jnp.array([[1.0, 1.1, -0.5], [-1.0, -1.1, -3.0]])
    seen = jnp.array([[False, True, False], [True, False, False]])
    keys = jax.random.split(jax.random.key(0), 2)
    plain = next_token(SamplingParams.create(), logits, seen, keys)
    punished = next_token(SamplingParams.create(repetition_penalty=2.0), logits, seen, keys)
    assert plain.tolist() == [1, 0]
    assert punished.tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0, 1e-300, 9e-6, np.float32(1e-6), 1e-5, 1e-4])
def test_tiny_temperatures_take_the_highest(temperature):
    """Below 1e-5 decoding is greedy; above it, the best token wins by far."""
    params = SamplingParams.create(temperature, 0, 0.9)
    assert params.greedy == (temperature < 1e-5)
    logits = jnp.array([[80.0, 81.0, -90.0]])
    keys = jax.random.split(jax.random.key(0), 1)
    assert next_token(params, logits, jnp.zeros((1, 3), bool), keys).tolist() == [1]


def test_divisors_that_overflow():
    params = SamplingParams.create(1e-5, 2, 0.9, 1e-38)
    logits = jnp.array([[80.0, 81.0, -90.0]])
    keys = jax.random.split(jax.random.key(0), 1)
    assert next_token(params, logits, jnp.ones((1, 3), bool), keys)[0] in (0, 1)


def test_seeds_of_64_bits():
    """Seeds below 2**32 give JAX's own keys; both halves of the others count."""
    halves = jnp.array([[0, 7], [1, 7], [2, 7], [1, 8], [0xFFFFFFFF, 7]], jnp.uint32)
    data = np.asarray(jax.random.key_data(make_keys(halves)))
    np.testing.assert_array_equal(data[0], jax.random.key_data(jax.random.key(7)))
    assert len({tuple(row) for row in data.tolist()}) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, float("nan"), float("inf"), "hot", None)),
        *(("top_k", value) for value in (-2, 1.5, "5", None, float("inf"))),
        *(("top_p", value) for value in (0, 1.5, float("nan"), "x")),
        *(("repetition_penalty", value) for value in (0, -1, float("inf"))),
    ],
)
def test_ranges(name, value):
    with pytest.raises(UserError, match=name):
        SamplingParams.create(**{name: value})


def test_numbers_of_numpy_and_of_any_size():
    params = SamplingParams.create(
        np.float32(0.5), np.int64(7), np.float16(0.5), np.array(1.5, np.float32)
    )
    assert (params.temperature, params.top_k, params.top_p) == (0.5, 7, 0.5)
    assert params.repetition_penalty == 1.5
    assert SamplingParams.create(1.0, 10**30).top_k == 2**31 - 1
    assert not SamplingParams.create(1.0, -1).truncates
