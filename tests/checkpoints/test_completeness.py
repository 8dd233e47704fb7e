"""A checkpoint that is torn or damaged is never taken: the newest complete one is."""

import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_case import write_source
from workdir_case import save_two_steps, state

from convert import to_jax
from vl2jax.checkpoints.completeness import MARKER, complete_steps
from vl2jax.checkpoints.model_dir import CheckpointError, load_params, read_model_dir
from vl2jax.common.errors import UserError
from vl2jax.training.workdir import Workdir


def likes(rows: int = 8):
    return {
        f"like_{name}": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        for name, tree in zip(("params", "opt_state"), state(0, rows), strict=True)
    }


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_two_steps(path)
    return path


@pytest.fixture
def run(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def newest_file(step: Path, part: str) -> Path:
    files = [file for file in (step / part).rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


TEARS = {
    "data": lambda step: shutil.rmtree(step / "data"),
    "opt_state": lambda step: shutil.rmtree(step / "opt_state"),
    "params": lambda step: shutil.rmtree(step / "params"),
    "marker": lambda step: (step / MARKER).unlink(),
    "damaged marker": lambda step: cut(step / MARKER),
    "empty marker": lambda step: (step / MARKER).write_text('{"files": {}}'),
    "other marker": lambda step: (step / MARKER).write_text("[]"),
    "metadata": lambda step: (step / "params" / "_METADATA").unlink(),
    "manifest": lambda step: (step / "opt_state" / "manifest.ocdbt").unlink(),
    "truncated chunks": lambda step: cut(newest_file(step, "params")),
    "empty file": lambda step: newest_file(step, "opt_state").write_bytes(b""),
    "empty data": lambda step: (step / "data" / "metadata").write_bytes(b""),
    "all but the marker": lambda step: [shutil.rmtree(step / x) for x in ("data", "params")],
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_newest_checkpoint_falls_back(tear, run, capsys):
    TEARS[tear](run / "checkpoints" / "2")
    with Workdir(run, keep=9, keep_every=None) as workdir:
        assert workdir.latest_step() == 1
        step, params, _, data_state = workdir.restore(**likes())
        told = capsys.readouterr().err.splitlines()
        params2, opt_state2 = state(2)
        workdir.save(2, params=params2, opt_state=opt_state2, data_state={"next": 5}, wait=True)
        assert workdir.latest_step() == 2
    assert (step, data_state) == (1, {"next": 1})
    np.testing.assert_array_equal(
        params["params"]["image_newline"], state(1)[0]["params"]["image_newline"]
    )
    assert len(told) == 1 and told[0].startswith("warning: checkpoint 2 is not complete (")
    assert told[0].endswith("2.incomplete, not used")
    assert sorted(x.name for x in (run / "checkpoints").iterdir()) == ["1", "2", "2.incomplete"]


def test_if_no_checkpoint_is_complete_training_does_not_start_again(run):
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / str(step) / "params")
    with pytest.raises(UserError, match=r"step 2: params is missing; step 1: params is missing"):
        Workdir(run, keep=9, keep_every=None)
    assert sorted(x.name for x in (run / "checkpoints").iterdir()) == ["1", "2"]


def test_an_older_torn_checkpoint_is_named_when_asked_for(run):
    shutil.rmtree(run / "checkpoints" / "1" / "data")
    with Workdir(run, keep=9, keep_every=None) as workdir:
        assert workdir.restore(**likes())[0] == 2
        with pytest.raises(CheckpointError, match=r"/1 is not complete: data is missing"):
            workdir.restore(1, **likes())


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def test_every_flipped_bit_is_found(run):
    """40 of 40, anywhere in a checkpoint; it is never restored as if nothing had happened."""
    rng, step = random.Random(0), run / "checkpoints" / "2"
    files = [file for file in sorted(step.rglob("*")) if file.is_file()]
    files = [file for file in files if file.stat().st_size and file.parent != step]
    for number in range(40):
        file = files[number % len(files)]
        before = file.read_bytes()
        flip(file, rng)
        assert complete_steps(run, ("params", "opt_state", "data")) == [1], file
        file.write_bytes(before)
    assert complete_steps(run, ("params", "opt_state", "data")) == [1, 2]


def test_checksums_of_chunks_find_what_is_in_large_files(tmp_path, monkeypatch, capsys):
    """Large files have no checksum in the marker; the chunks have their own."""
    monkeypatch.setattr("vl2jax.checkpoints.completeness._CHECKED", -1)
    rng, rows = random.Random(1), 4096
    with Workdir(tmp_path, keep=9, keep_every=None) as workdir:
        for step in (1, 2):
            params, opt_state = state(step, rows)
            workdir.save(step, params=params, opt_state=opt_state, data_state={})
    step = tmp_path / "checkpoints" / "2"
    file = newest_file(step, "params")
    whole = file.read_bytes()
    assert len(whole) > 200_000
    for _ in range(40):
        flip(file, rng)
        assert complete_steps(tmp_path) == [1, 2]  # nothing is known of it before it is read
        with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
            load_params(step / "params")
        file.write_bytes(whole)
    flip(file, rng)
    with Workdir(tmp_path, keep=9, keep_every=None) as workdir:
        assert workdir.latest_step() == 2
        assert workdir.restore(**likes(rows))[0] == 1
        assert workdir.latest_step() == 1
    assert "checkpoint 2 is not complete (stored data is damaged" in capsys.readouterr().err


def test_a_checkpoint_without_marker_and_checksums_is_judged_by_its_structure(run, tmp_path):
    """Checkpoints that were written before there was a marker still load."""
    import orbax.checkpoint as ocp

    for step in (1, 2):
        old = run / "checkpoints" / str(step)
        shutil.rmtree(old)
        items = dict(zip(("params", "opt_state"), state(step), strict=True))
        items["opt_state"] = nested(items["opt_state"])
        for name, tree in items.items():
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(old / name, tree)
        (old / "data").mkdir()
        (old / "data" / "metadata").write_text(json.dumps({"next": step}))
    with Workdir(run, keep=9, keep_every=None) as workdir:
        assert workdir.restore(**likes())[0] == 2
    (run / "checkpoints" / "2" / "data" / "metadata").write_text('{"ne')
    with Workdir(run, keep=9, keep_every=None) as workdir:
        assert workdir.restore(**likes())[0] == 1


def nested(tree):
    """A tree as nested dicts with the names that `save` gives."""
    from vl2jax.checkpoints.model_dir import flatten

    result: dict = {}
    for path, leaf in flatten(tree).items():
        *parents, last = path.split("/")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(leaf)
    return result


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    to_jax.convert(write_source(folder / "hf"), folder / "model")
    return folder / "model"


def test_a_converted_model_is_covered_too(converted, tmp_path):
    """Any flipped bit of the parameters or of model.json is found when the model is read."""
    rng = random.Random(3)
    path = Path(shutil.copytree(converted, tmp_path / "model"))
    files = [file for file in sorted((path / "params").rglob("*")) if file.is_file()]
    files = [path / "model.json", *(file for file in files if file.stat().st_size)]
    for number in range(40):
        file = files[number % len(files)]
        before = file.read_bytes()
        flip(file, rng)
        with pytest.raises(UserError):
            load_params(read_model_dir(path).params)
        file.write_bytes(before)
    read_model_dir(path)
    (path / "tokenizer.json").write_text("{}")  # a user may edit it
    read_model_dir(path)
    newest_file(path, "params").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: params/.* is missing; convert it"):
        read_model_dir(path)
