"""Tests of a run on text alone: a batch without tile slots."""

import json

import jax
import numpy as np
import pytest
import smallest

from vl2jax.common.errors import UserError
from vl2jax.parallel.sharding import make_mesh
from vl2jax.processing.processor import Processor
from vl2jax.synthetic.tokens import write_processor_files
from vl2jax.training.run_config import read_run_config
from vl2jax.training.setup import (
    IMAGE_PARTS,
    choose_architecture,
    jit_train_step,
    make_data,
    make_recipe,
)
from vl2jax.training.train_step import init_state

QUESTION = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three of them."}]


@pytest.fixture
def prepared(tmp_path):
    """Configuration, mesh, recipe and processor of a run with `batch.tiles=0`."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"{json.dumps({'conversations': QUESTION})}\n" * 20)
    values = smallest.get_config().to_dict()
    values["batch"] |= {"tiles": 0, "length": 32}
    values["data"] |= {"train": str(rows), "heldout": ""}
    values["optim"] |= {"weight_decay": 0.5, "lr_multipliers": {"vision": 0.1}, "warmup_steps": 0}
    config = read_run_config(values)
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, jax.devices()[:1])
    architecture = choose_architecture(config)
    write_processor_files(tmp_path, architecture)
    return (
        config,
        mesh,
        make_recipe(config, architecture, mesh),
        Processor.from_dir(tmp_path, architecture),
    )


@pytest.mark.usefixtures("quick_compilation")
def test_a_step_trains_the_decoder_alone(prepared):
    config, mesh, recipe, processor = prepared
    assert not any(path.startswith(IMAGE_PARTS) for path in recipe.trained)
    with jax.set_mesh(mesh):
        state = jax.jit(init_state, static_argnums=0)(recipe, jax.random.key(0))
        before = jax.device_get(state.params)
        batches = iter(make_data(config, mesh, processor, pytest.fail, pools=1))
        batch = next(batches).batch
        batches.close()
        assert batch.tiles.shape[:2] == (1, 0)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        state, metrics = jit_train_step(recipe, mesh, shardings)(state, batch)
    assert np.isfinite(metrics["train/loss"])
    for name, part in before.items():
        pairs = zip(jax.tree.leaves(part), jax.tree.leaves(state.params[name]), strict=True)
        same = [np.array_equal(old, new) for old, new in pairs]
        assert not any(same) if name == "decoder" else all(same), name


def test_images_have_no_room(prepared, tmp_path):
    config, mesh, _, processor = prepared
    values = smallest.get_config().to_dict()
    values["batch"] |= {"tiles": 0}
    config = read_run_config(values)
    batches = iter(make_data(config, mesh, processor, pytest.fail, pools=1))
    with pytest.raises(UserError, match="tiles, but a part of the batch only 0 slots"):
        next(batches)
    batches.close()
