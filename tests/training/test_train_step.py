"""The train step: parity with the original, invariances, frozen parts, load balancing."""

import dataclasses
import functools
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from flax.traverse_util import flatten_dict
from golden import by_original_name, minis, padded_batch

from vl2jax.data.packing import BatchShape, Packer, assemble
from vl2jax.model.vl2 import VL2
from vl2jax.processing.collate import Sample
from vl2jax.training.optim import OptimConfig, learning_rate, make_optimizer, trained_paths
from vl2jax.training.train_step import Recipe, eval_step, new_state, train_step

# An optimizer that stores the gradients as its state and updates nothing.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
quick = pytest.mark.usefixtures("quick_compilation")


@functools.partial(jax.jit, static_argnums=0)
def step(recipe, state, batch):
    return train_step(recipe, state, batch)


def recipe_of(model, optimizer=RECORDER, frozen=(), **kwargs) -> Recipe:
    cfg = OptimConfig(lr=1e-3, frozen=frozen)
    paths = flatten_dict(model.params["params"], sep="/")
    return Recipe(
        model=kwargs.pop("module", VL2(model.config)),
        optimizer=optimizer,
        schedule=learning_rate(cfg, 10),
        trained=trained_paths(cfg, paths),
        **kwargs,
    )


def gradients(model, recipe, batch):
    """Metrics, and the gradients of all trained parameters by path."""
    state, metrics = step(recipe, new_state(recipe, model.params), batch)
    return metrics, state.opt_state


def in_pools(batch, pools: int = 1):
    """Adds a leading axis of microbatches; the tiles must be in the order of the microbatches."""
    return jax.tree.map(lambda x: x.reshape(pools, -1, *x.shape[1:]), batch)


@pytest.mark.parametrize(("name", "case"), minis(("mini-small", "mini-base"), ("train_nopad",)))
def test_reference(mini, name, case):
    """Loss, auxiliary loss and all gradient norms equal those of the original, without padding.

    The two models have the two kinds of router; test_parity.py checks gradients of all models.
    """
    model = mini(name, case)
    training = model.case(case)["training"]
    batch = in_pools(padded_batch(model.config, model.arrays(case)))
    if "loss_aux" in training:
        tag, recipe = "aux", recipe_of(model)
    else:
        decoder = dataclasses.replace(model.config.decoder, aux_loss_alpha=0.0)
        config = dataclasses.replace(model.config, decoder=decoder)
        tag, recipe = "noaux", recipe_of(model, module=VL2(config))
    metrics, grads = gradients(model, recipe, batch)
    assert metrics["train/loss"] == pytest.approx(training[f"loss_{tag}"], rel=2e-6)
    if tag == "aux":
        want = sum(training["aux_loss_per_layer"].values())
        assert metrics["train/aux_loss"] == pytest.approx(want, rel=5e-6)
    tree = {}
    for path, leaf in grads.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    found = by_original_name(model.config, {"params": tree})
    checked = 0
    for original, norm in training[f"grad_norms_{tag}"].items():
        if norm is not None and original in found:
            got = np.linalg.norm(found[original].astype(np.float64))
            assert got == pytest.approx(norm, rel=1e-4, abs=1e-6), original
            checked += 1
    assert checked > 100


@pytest.fixture(scope="module")
def samples(mini) -> list[Sample]:
    """Four conversations of different lengths, two of them with an image."""
    processor, rng = mini("mini-small").processor, np.random.default_rng(0)
    found = []
    for number, (question, answer) in enumerate(
        [
            ("What is it?", "A cat"),
            ("Why so?", "It says meow, and it has whiskers"),
            ("Where?", "There, on the mat"),
            ("How many legs has it?", "Four"),
        ]
    ):
        pixels = rng.integers(0, 256, (60, 50, 3), np.uint8)
        images = [PIL.Image.fromarray(pixels)] if number % 2 else []
        text = "<image>\n" * len(images) + question
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        found.append(processor.sample(messages, images, inference=False, mask_prompt=True))
    return found


def packed(model, samples, **shape):
    """Packs all samples into one batch of the given shape."""
    longest, tiles = max(map(len, samples)), sum(len(s.tiles) for s in samples)
    shape = BatchShape(**{"pools": 1, "length": longest, "tiles": tiles, "segments": 1, **shape})
    placed = Packer(shape).fill(types.SimpleNamespace(sample=sample) for sample in samples)
    assert len(placed) == len(samples)
    return assemble(
        [(place, item.sample) for place, item in placed],
        shape=shape,
        pad_id=model.processor.tokenizer.pad_id,
        tile_side=model.config.vision.image_size,
        tokens_per_tile=model.config.tokens_per_tile,
    )


@quick
@pytest.mark.parametrize("shape", ["packed", "padded", "microbatches"])
def test_same_samples_same_gradients(mini, samples, shape):
    """Packing, padding and microbatches change neither loss nor gradients."""
    model = mini("mini-small")
    total, tiles = sum(map(len, samples)), sum(len(s.tiles) for s in samples)
    other = {
        "packed": dict(rows=1, length=total, segments=4),
        "padded": dict(rows=4, length=total, tiles=tiles + 3),
        "microbatches": dict(pools=4, rows=1, tiles=max(len(s.tiles) for s in samples)),
    }[shape]
    module = VL2(model.config, max_segments=4)
    recipe = recipe_of(model, module=module)
    want, want_grads = gradients(model, recipe, packed(model, samples, rows=4))
    got, grads = gradients(model, recipe, packed(model, samples, **other))
    assert got["train/loss"] == pytest.approx(float(want["train/loss"]), rel=1e-6)
    assert got["train/aux_loss"] == pytest.approx(float(want["train/aux_loss"]), rel=1e-6)
    assert got["train/token_acc"] == want["train/token_acc"]
    # Within 1e-6 of the global norm, and each within a few float32 roundings (eps = 1.2e-7).
    double = {path: np.asarray(gradient, np.float64) for path, gradient in want_grads.items()}
    whole = np.sqrt(sum(np.sum(gradient**2) for gradient in double.values()))
    for path, gradient in double.items():
        distance = np.linalg.norm(np.asarray(grads[path], np.float64) - gradient)
        assert distance <= 1e-6 * whole, path
        assert distance <= 3e-6 * np.linalg.norm(gradient), path


@quick
def test_samples_of_a_row_do_not_see_one_another(mini, samples):
    """Replacing the first sample of a row does not change the loss of the second."""
    model = mini("mini-small")
    recipe = recipe_of(model, module=VL2(model.config, max_segments=2))
    longest = max(map(len, samples)) * 2
    sums = []
    for first in (samples[0], samples[2]):
        silent = dataclasses.replace(first, loss_mask=np.zeros_like(first.loss_mask))
        batch = packed(model, [silent, samples[3]], rows=1, length=longest, segments=2, tiles=8)
        state = new_state(recipe, model.params)
        sums.append(eval_step(recipe, state.params, state.router, batch)[0])
    assert sums[0] == pytest.approx(float(sums[1]), rel=1e-6)


@quick
def test_frozen_parts_do_not_move(mini, samples):
    """Frozen parts stay bit-identical and have no optimizer state; multipliers scale updates."""
    model = mini("mini-small")
    cfg = OptimConfig(lr=1e-2, schedule="constant", frozen=("decoder",))
    recipe = recipe_of(model, make_optimizer(cfg, 10), frozen=("decoder",))
    state = new_state(recipe, model.params)
    kept = {
        key.key
        for path, _ in jax.tree.leaves_with_path(state.opt_state)
        for key in path
        if isinstance(key, jax.tree_util.DictKey)
    }
    assert kept == set(recipe.trained)
    after, _ = step(recipe, state, packed(model, samples, rows=4))
    before, after = (flatten_dict(s.params, sep="/") for s in (state, after))
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same == path.startswith("decoder/"), path
    trained = {path: before[path] for path in recipe.trained}
    grads, updates = jax.tree.map(np.ones_like, trained), {}
    cfg = dataclasses.replace(cfg, schedule="cosine")  # XLA folds a constant rate into the factor
    for factor in (1.0, 0.1):
        optimizer = make_optimizer(dataclasses.replace(cfg, lr_multipliers={"vision": factor}), 10)
        updates[factor], _ = jax.jit(optimizer.update)(grads, optimizer.init(trained), trained)
    for path, update in updates[1.0].items():
        want = update * np.float32(0.1) if path.startswith("vision/") else update
        np.testing.assert_array_equal(updates[0.1][path], want, err_msg=path)


def with_biases(model):
    """The model with a sigmoid router and random correction biases."""
    kind = dict(topk_method="noaux_tc", scoring_func="sigmoid", n_group=1, topk_group=1)
    decoder = dataclasses.replace(model.config.decoder, **kind)
    rng, router = np.random.default_rng(1), {}
    for run in decoder.layer_runs:
        if run.is_moe:
            bias = rng.normal(0, 0.1, (run.count, decoder.n_routed_experts)).astype(np.float32)
            router[run.name] = {"mlp": {"gate": {"e_score_correction_bias": bias}}}
    config = dataclasses.replace(model.config, decoder=decoder)
    params = {"params": model.params["params"], "router": {"decoder": router}}
    return dataclasses.replace(model, config=config, params=params)


@quick
def test_bias_update(mini, samples):
    """The update of the correction bias against NumPy, with the load summed over microbatches."""
    model, u = with_biases(mini("mini-small")), 0.25
    module = VL2(model.config, max_segments=1)
    recipe = recipe_of(model, module=module, bias_update_step=u)
    shape = dict(pools=4, rows=1, tiles=max(len(s.tiles) for s in samples))
    batch = packed(model, samples, **shape)
    state = new_state(recipe, model.params)
    after, metrics = step(recipe, state, batch)
    runs = [run for run in model.config.decoder.layer_runs if run.is_moe]
    forward, load = jax.jit(lambda batch: module.apply(model.params, batch).balance.load), 0
    for pool in range(4):
        one = jax.tree.map(lambda x, pool=pool: x[pool], batch)
        load = load + np.asarray(forward(one), np.float64)
    first, tokens = 0, sum(map(len, samples)) * model.config.decoder.num_experts_per_tok
    for run in runs:
        rows = slice(first, first + run.count)
        first += run.count
        path = ("decoder", run.name, "mlp", "gate", "e_score_correction_bias")
        before, got = (functools.reduce(operator.getitem, path, s.router) for s in (state, after))
        assert (load[rows].sum(axis=1) == tokens).all()
        mean = load[rows].mean(axis=1, keepdims=True)
        want = np.asarray(before, np.float64) + u * np.sign(mean - load[rows])
        np.testing.assert_allclose(got, want, atol=1e-7)
        norm = np.linalg.norm(want, axis=1)
        np.testing.assert_allclose(metrics["moe/bias_norm"][rows], norm, rtol=1e-6)
    violation = load.max(axis=1) / load.mean(axis=1) - 1
    np.testing.assert_allclose(metrics["moe/max_violation"], violation, rtol=1e-6)
    assert metrics["moe/dead_experts"].tolist() == (load == 0).sum(axis=1).tolist()
    share = load / load.sum(axis=1, keepdims=True)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=1)
    np.testing.assert_allclose(metrics["moe/entropy"], entropy / np.log(load.shape[1]), rtol=1e-5)
