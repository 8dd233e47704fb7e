"""bfloat16 parameters: unbiased rounding, movement at a small learning rate, meshes, resuming."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import mesh_case
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.checkpoints.model_dir import flatten
from vl2jax.parallel.sharding import make_mesh, param_spec
from vl2jax.training.optim import OptimConfig, make_optimizer
from vl2jax.training.rounding import apply_updates, round_to_bfloat16
from vl2jax.training.train_step import new_state, train_step
from vl2jax.training.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")

BF16 = jnp.bfloat16
round_jitted = jax.jit(round_to_bfloat16)
SHAPES = {
    "decoder/moe_1/mlp/experts/up_proj": (2, 8, 16, 24),
    "decoder/lm_head/kernel": (16, 64),
    "decoder/norm/scale": (16,),
}


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16)


def every_bfloat16() -> jax.Array:
    return jnp.asarray(np.arange(2**16, dtype=np.uint16)).view(BF16)


def test_what_bfloat16_has_is_not_changed():
    """All 2^16 bit patterns: both zeros, the smallest numbers, infinities; NaN stays NaN."""
    every = every_bfloat16()
    wide = jnp.asarray(bits(every).astype(np.uint32) << 16).view(jnp.float32)
    nan = np.isnan(np.asarray(wide))
    for seed in range(8):
        got = round_jitted(wide, seed)
        assert np.isnan(np.asarray(got, np.float32)[nan]).all()
        np.testing.assert_array_equal(bits(got)[~nan], bits(every)[~nan])


def test_finite_numbers_stay_finite():
    largest = float(jnp.finfo(BF16).max)
    above = np.nextafter(np.float32(largest), np.inf)
    beyond = np.array([np.finfo(np.float32).max, above], np.float32)
    x = np.repeat(np.concatenate([beyond, -beyond]), 512)
    got = np.asarray(round_jitted(jnp.asarray(x), 3), np.float32)
    np.testing.assert_array_equal(np.abs(got), largest)
    np.testing.assert_array_equal(np.sign(got), np.sign(x))
    all_nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    got = np.asarray(round_jitted(jnp.asarray(np.repeat(all_nan, 512)), 4), np.float32)
    assert np.isnan(got).all()


def test_rounding_is_unbiased():
    """Of numbers of all sizes and signs, the mean over seeds is the number itself."""
    rng, seeds = np.random.default_rng(0), 4096
    exponents = rng.uniform(-120, 120, 500)
    x = (rng.choice([-1, 1], 500) * 2.0**exponents).astype(np.float32)
    lower = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # towards 0
    upper = ((x.view(np.uint32) | 0xFFFF) + 1).view(np.float32)
    share = (x.astype(np.float64) - lower) / (upper.astype(np.float64) - lower)
    draws = jax.jit(jax.vmap(round_to_bfloat16, in_axes=(None, 0)))(x, jnp.arange(seeds))
    draws = np.asarray(draws, np.float32)
    assert np.all((draws == lower) | (draws == upper))
    went = (draws == upper).mean(axis=0)
    deviation = np.sqrt(share * (1 - share) / seeds)
    z = (went - share) / np.maximum(deviation, 1e-4)
    assert np.abs(z).max() < 5 and 0.8 < z.std() < 1.2


def test_draws_of_elements_steps_and_parameters_are_independent():
    """The correlation of neighbours, of other steps and of other paths is that of chance."""
    halfway = jnp.full((64, 64, 64), np.uint32(0x3F808000).view(np.float32))
    params = {name: jnp.zeros(halfway.shape, BF16) for name in ("a/kernel", "b/kernel")}
    updates = {name: halfway for name in params}

    @jax.jit
    def up(step):
        key = jax.random.fold_in(jax.random.key(7), step)
        return {name: x > 1 for name, x in apply_updates(params, updates, key).items()}

    first, second = ({k: 2.0 * np.asarray(v) - 1 for k, v in up(s).items()} for s in (0, 1))
    one = first["a/kernel"]
    chance = 5 / np.sqrt(one.size)
    assert abs(one.mean()) < chance
    for axis in range(3):
        assert abs((one * np.roll(one, 1, axis)).mean()) < chance
    for other in (first["b/kernel"], second["a/kernel"], second["b/kernel"]):
        assert abs((one * other).mean()) < chance


def test_updates_of_zero_and_float32_parameters():
    every = every_bfloat16()
    params = {"all": every, "float32": jnp.float32([1.0, -2.0])}
    updates = {"all": jnp.zeros(every.shape), "float32": jnp.float32([1e-7, 1e-6])}
    got = jax.jit(apply_updates)(params, updates, jax.random.key(0))
    number = ~np.isnan(np.asarray(every, np.float32))
    np.testing.assert_array_equal(bits(got["all"])[number], bits(every)[number])
    assert np.isnan(np.asarray(got["all"], np.float32)[~number]).all()
    assert got["float32"].dtype == jnp.float32
    np.testing.assert_array_equal(got["float32"], params["float32"] + updates["float32"])


def trained(algorithm: str, params, steps: int, state=None, first: int = 0, **fields):
    """Runs steps with the same gradient."""
    cfg = OptimConfig(lr=2e-5, algorithm=algorithm, schedule="constant", **fields)
    optimizer: Any = make_optimizer(cfg, 100)  # Optax types its states and updates as any tree
    rng = np.random.default_rng(9)
    grads = {p: jnp.asarray(rng.normal(size=params[p].shape), BF16) for p in sorted(params)}

    @jax.jit
    def step(number, params, state):
        updates, state = optimizer.update(grads, state, params)
        key = jax.random.fold_in(jax.random.key(5), number)
        return apply_updates(params, updates, key), state, updates

    state = optimizer.init(params) if state is None else state
    due = {path: np.zeros(x.shape, np.float32) for path, x in params.items()}
    for number in range(first, first + steps):
        params, state, updates = step(number, params, state)
        due = {path: total + np.asarray(updates[path]) for path, total in due.items()}
    return params, state, due


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_weights_move_by_their_due_at_a_small_learning_rate(algorithm):
    """At lr 2e-5 most weights are over 512 updates: to the nearest, they would never move."""
    rng = np.random.default_rng(1)
    params = {path: jnp.asarray(rng.normal(0, 0.1, s), BF16) for path, s in SHAPES.items()}
    params["decoder/lm_head/kernel"] = jnp.asarray(rng.normal(0, 0.1, (256, 64)), BF16)
    params["decoder/norm/scale"] = jnp.ones(16 * 1024, BF16)
    after, state, due = trained(algorithm, params, 40)
    for path, start in params.items():
        assert after[path].dtype == BF16 and due[path].dtype == np.float32
        moved = np.asarray(after[path], np.float64) - np.asarray(start, np.float64)
        # Of the movement along the due one; a rounding has a variance of at most gap * |due|.
        share = (moved * due[path]).sum() / (due[path] ** 2).sum()
        gap = 2.0**-7 * np.abs(np.asarray(start, np.float64)).max()
        deviation = np.sqrt(gap * (np.abs(due[path]) ** 3).sum()) / (due[path] ** 2).sum()
        assert deviation < 0.08 and share == pytest.approx(1, abs=4 * deviation), path
    floats = {x.dtype.name for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {"float32"}


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, algorithm, moments):
    rng = np.random.default_rng(2)
    params = {path: jnp.asarray(rng.normal(0, 0.1, s), BF16) for path, s in SHAPES.items()}
    saved = trained(algorithm, params, 3, moments_dtype=moments)
    like = jax.eval_shape(lambda: saved[:2])
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        workdir.save(3, params=saved[0], opt_state=saved[1], data_state={})
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        found = workdir.restore(like_params=like[0], like_opt_state=like[1])[1:3]
    want = trained(algorithm, params, 6, moments_dtype=moments)
    got = trained(algorithm, found[0], 3, found[1], first=3, moments_dtype=moments)
    for a, b in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(want[:2]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    shifted = trained(algorithm, found[0], 3, found[1], first=4, moments_dtype=moments)
    assert any(np.any(shifted[0][path] != want[0][path]) for path in SHAPES)


def test_a_mesh_rounds_as_one_device_and_exchanges_nothing():
    rng = np.random.default_rng(3)
    params = {path: jnp.asarray(rng.normal(size=s), BF16) for path, s in SHAPES.items()}
    updates = {path: jnp.asarray(rng.normal(0, 1e-4, s), jnp.float32) for path, s in SHAPES.items()}
    program = jax.jit(apply_updates)
    want = program(params, updates, jax.random.key(0))
    for axes in ({"fsdp": 2, "expert": 2, "tensor": 2}, {"fsdp": 8}):
        mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | axes)
        split = {path: NamedSharding(mesh, param_spec(path)) for path in SHAPES}
        key = jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
        inputs = jax.device_put(params, split), jax.device_put(updates, split), key
        with jax.set_mesh(mesh):
            compiled = jax.jit(apply_updates, out_shardings=split).lower(*inputs).compile()
        for path, value in compiled(*inputs).items():
            np.testing.assert_array_equal(bits(value), bits(want[path]), err_msg=path)
        assert not re.search("all-|collective|reduce-scatter", compiled.as_text() or "")


def test_a_train_step_of_bfloat16_parameters():
    """Microbatches are summed and moments kept in float32; frozen parameters keep their bits."""
    recipe, trained = mesh_case.recipe(mesh_case.architecture("mha")), "decoder/lm_head/kernel"
    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(zeros, params),
        lambda updates, state, params=None: (updates, updates),
    )
    optim = make_optimizer(OptimConfig(lr=2e-5, schedule="constant"), 10)
    recipe = dataclasses.replace(
        recipe,
        optimizer=optax.chain(keep, optim),
        trained=(trained,),
    )
    first = mesh_case.start(recipe)
    narrow = jax.tree.map(lambda x: jnp.asarray(x, BF16), first.params)
    state = new_state(recipe, {"params": narrow, "router": first.router})
    batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[2:]), mesh_case.batches(2)[0])
    step = jax.jit(functools.partial(train_step, recipe))
    after, metrics = step(state, batch)
    assert jax.tree.map(_kind, after) == jax.tree.map(_kind, state)
    gradients, rest = after.opt_state
    floats = [x for x in jax.tree.leaves(rest) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype.name for x in (*gradients.values(), *floats)} == {"float32"}
    sums = np.asarray(gradients[trained]).view(np.uint32)
    assert (sums & 0xFFFF).any()  # sums of two that bfloat16 does not have
    before, moved = (flatten(s.params) for s in (state, after))
    assert {x.dtype.name for x in moved.values()} == {"bfloat16"}
    changed = {path for path in before if np.any(bits(before[path]) != bits(moved[path]))}
    assert changed == {trained}
    norm = np.linalg.norm(np.asarray(moved[trained], np.float64))
    assert metrics["train/param_norm"] == pytest.approx(norm, rel=1e-5)


def _kind(x) -> tuple:
    return x.shape, x.dtype.name
