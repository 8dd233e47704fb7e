"""Training checkpoints are exact and atomic, follow the keep rules, and load as models."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from convert_case import read_all, write_source
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from workdir_case import state

import vl2jax
from convert import to_hf, to_jax
from vl2jax.checkpoints.model_dir import CheckpointError, load_params, read_model_dir
from vl2jax.checkpoints.orbax_io import reason
from vl2jax.checkpoints.param_store import ParamStore
from vl2jax.common.errors import UserError
from vl2jax.programs import sample
from vl2jax.training import lineage
from vl2jax.training.workdir import Workdir


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree) -> list[tuple]:
    """dtype, shape and bytes of every leaf, copied."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(leaf.dtype.name, leaf.shape, leaf.tobytes()) for leaf in leaves]


def save(workdir, step, seed=None, **options):
    params, opt_state = state(step if seed is None else seed)
    workdir.save(
        step, params=params, opt_state=opt_state, data_state={"next": 10 * step}, **options
    )


def restore(workdir, step=None):
    params, opt_state = state(0)
    return workdir.restore(step, like_params=like(params), like_opt_state=like(opt_state))


def listed(workdir) -> list[str]:
    return sorted(path.name for path in (workdir.path / "checkpoints").iterdir())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    with Workdir(tmp_path / "run", keep=2, keep_every=None) as workdir:
        assert workdir.latest_step() is None
        save(workdir, 7, wait=True)
        assert workdir.latest_step() == 7
    with Workdir(tmp_path / "run", keep=2, keep_every=None) as workdir:
        step, params, opt_state, data_state = restore(workdir)
    assert (step, data_state) == (7, {"next": 70})
    assert jax.tree.structure((params, opt_state)) == jax.tree.structure(state(7))
    assert bits((params, opt_state)) == bits(state(7))
    assert {x[0] for x in bits((params, opt_state))} == {"bfloat16", "float32", "int32"}
    assert int(opt_state[2][0]) == 7


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("a", "b"))
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def update(tree):
        return jax.tree.map(lambda x: 2 * x + 1, tree)

    values = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
    tree = {"split": jax.device_put(values, split), "whole": jax.device_put(values, whole)}
    wanted = {}
    with Workdir(tmp_path, keep=9, keep_every=None) as workdir:
        for step in range(3):
            wanted[step] = bits(tree)
            opt_state = {"n": jnp.int32(step), "m": jnp.copy(tree["whole"])}
            workdir.save(step, params={"params": tree}, opt_state=opt_state, data_state={})
            for _ in range(3):
                tree, opt_state = {name: update(x) for name, x in tree.items()}, update(opt_state)
        likes = dict(like_params={"params": like(tree)}, like_opt_state=like(opt_state))
        for step in range(3):
            _, params, opt_state, _ = workdir.restore(step, **likes)
            assert bits(params) == wanted[step]
            assert bits(opt_state["m"]) == wanted[step][1:]
            assert params["params"]["split"].sharding == split
            assert int(opt_state["n"]) == step


def test_arrays_go_where_the_run_wants_them_now(tmp_path):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    params, opt_state = state(1)
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        save(workdir, 1)
        sharding = NamedSharding(mesh, PartitionSpec(None, "a"))
        wanted = like(params)
        experts = wanted["params"]["decoder"]["moe_1"]["mlp"]["experts"]
        experts["up_proj"] = jax.ShapeDtypeStruct((2, 2, 8, 4), jnp.float32, sharding=sharding)
        _, params, _, _ = workdir.restore(like_params=wanted, like_opt_state=like(opt_state))
    moved = params["params"]["decoder"]["moe_1"]["mlp"]["experts"]["up_proj"]
    assert moved.sharding == sharding
    assert moved.addressable_shards[0].data.shape == (2, 1, 8, 4)
    assert bits(params) == bits(state(1)[0])


def test_newest_and_every_nth_are_kept(tmp_path):
    with Workdir(tmp_path, keep=2, keep_every=4) as workdir:
        for step in (0, 2, 4, 5, 6, 8, 9, 10):
            save(workdir, step)
        workdir.wait()
        assert listed(workdir) == ["0", "10", "4", "8", "9"]
        assert restore(workdir)[0] == 10
        assert restore(workdir, 4)[3] == {"next": 40}
        with pytest.raises(CheckpointError, match=r"has no step 5; it has 0, 4, 8, 9, 10"):
            restore(workdir, 5)


def test_a_complete_step_is_left_as_it_is(tmp_path):
    with Workdir(tmp_path, keep=2, keep_every=None) as workdir:
        save(workdir, 3, wait=True)
        save(workdir, 3, seed=99, wait=True)
        assert bits(restore(workdir)[1]) == bits(state(3)[0])


def test_impossible_keep_rules(tmp_path):
    with pytest.raises(UserError, match=r"at least 1, got 0 and None"):
        Workdir(tmp_path, keep=0, keep_every=None)
    with pytest.raises(UserError, match=r"at least 1, got 2 and 0"):
        Workdir(tmp_path, keep=2, keep_every=0)


def test_nothing_to_restore(tmp_path):
    with (
        Workdir(tmp_path, keep=1, keep_every=None) as workdir,
        pytest.raises(CheckpointError, match="has no complete checkpoint yet"),
    ):
        restore(workdir)


def test_two_runs_in_one_workdir(tmp_path):
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        with pytest.raises(UserError, match=r"another run is training in .*; wait until it ends"):
            Workdir(tmp_path, keep=1, keep_every=None)
        save(workdir, 1)
    Workdir(tmp_path, keep=1, keep_every=None).close()


def test_a_changed_configuration_is_reported_at_once(tmp_path):
    params, opt_state = state(0)
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        save(workdir, 1, wait=True)
        params["params"]["view_seperator"] = params["params"].pop("image_newline")
        decoder = params["params"]["decoder"]["moe_1"]
        decoder["mlp"]["experts"]["up_proj"] = jnp.zeros((2, 3, 8, 4))
        opt_state[0]["mu"]["image_newline"] = jnp.zeros(4, jnp.float32)
        with pytest.raises(UserError) as error:
            workdir.restore(like_params=like(params), like_opt_state=like(opt_state))
    head, *lines = str(error.value).splitlines()
    assert "checkpoints/1 does not match the configuration of this run" in head
    assert lines == [
        "  - params: missing: params/view_seperator bfloat16[4]",
        "  - params: unexpected: params/image_newline",
        "  - params: params/decoder/moe_1/mlp/experts/up_proj is float32[2, 2, 8, 4],"
        " expected float32[2, 3, 8, 4]",
        "  - opt_state: 0/mu/image_newline is bfloat16[4], expected float32[4]",
    ]


# Failures.


@pytest.fixture
def file_size_limit():
    """`file_size_limit(bytes)`: writes beyond it fail, as on a full disk; None: no limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        soft = before[0] if size is None else size
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))

    yield limit
    limit(None)


@pytest.mark.parametrize("seen_by", ["poll", "wait", "save"])
def test_a_failed_save_is_told_once_and_harms_nothing(tmp_path, file_size_limit, capfd, seen_by):
    told = []
    big, opt_state = state(0, rows=20_000)
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        workdir.on_error = told.append
        save(workdir, 1, wait=True)
        file_size_limit(100_000)
        workdir.save(2, params=big, opt_state=opt_state, data_state={})
        if seen_by == "poll":
            until = time.monotonic() + 20
            while not told and time.monotonic() < until:
                workdir.poll()
                time.sleep(0.01)
        elif seen_by == "wait":
            workdir.wait()
        else:
            workdir.save(3, params=big, opt_state=opt_state, data_state={})
            workdir.wait()
            assert "checkpoint 3 could not be saved" in told.pop()
        workdir.wait()
        assert len(told) == 1
        assert told[0].startswith(f"checkpoint 2 could not be saved in {tmp_path}/checkpoints: ")
        assert told[0].endswith(
            "; the newest checkpoint is 1, and the next save is attempted as usual"
        )
        assert "\n" not in told[0] and "File too large" in told[0]
        assert workdir.latest_step() == 1
        assert bits(restore(workdir)[1]) == bits(state(1)[0])
        file_size_limit(None)
        save(workdir, 4, wait=True)
        assert listed(workdir) == ["4"]
        assert bits(restore(workdir)[1]) == bits(state(4)[0])
        assert len(told) == 1
    assert capfd.readouterr() == ("", "")


def test_a_failed_first_save_warns_by_default(tmp_path, file_size_limit, capsys):
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        file_size_limit(1)
        save(workdir, 1, wait=True)
        file_size_limit(None)
        assert workdir.latest_step() is None
        save(workdir, 1, wait=True)
        assert workdir.latest_step() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("warning: checkpoint 1 could not be saved") and err.count("\n") == 1
    assert "there is no checkpoint yet" in err


def test_late_writes_of_a_failed_save_are_removed_too(tmp_path, monkeypatch):
    torn = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    remove, late = shutil.rmtree, ["c", "b", "a"]

    def remove_before_the_last_write(path, **options):
        remove(path, **options)
        if late:
            torn.mkdir()
            (torn / late.pop()).touch()

    monkeypatch.setattr(shutil, "rmtree", remove_before_the_last_write)
    with Workdir(tmp_path, keep=1, keep_every=None):
        assert not late and not torn.exists()


def test_reasons_in_a_few_words():
    where = 'Error writing "params.x/0" in OCDBT database at local file "/x"'
    assert reason(OSError(28, "No space left on device")) == "the disk is full"
    full = f"RESOURCE_EXHAUSTED: {where}: [OS error 28: ENOSPC No space left on device]"
    assert reason(ValueError(full)) == "the disk is full"
    quota = f"RESOURCE_EXHAUSTED: {where}: Disk quota exceeded [os_error_code='122']"
    assert reason(ValueError(quota)) == "the disk quota is used up"
    assert reason(OSError(5, "Input/output error")) == "input/output error of the device"
    bad = f"DATA_LOSS: {where}: bad [source locations='a.cc:1\nb.cc:2']"
    assert reason(ValueError(bad)) == "bad"
    assert reason(TimeoutError()) == "TimeoutError"


def test_what_a_killed_run_left_is_removed(tmp_path):
    with Workdir(tmp_path, keep=3, keep_every=None) as workdir:
        save(workdir, 1)
        save(workdir, 2)
    torn = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "2", torn)
    with Workdir(tmp_path, keep=3, keep_every=None) as workdir:
        assert listed(workdir) == ["1", "2"]
        assert restore(workdir)[0] == 2


ROWS = 200_000
CHILD = f"""
import itertools, sys
sys.path[:0] = ["tests", "."]
from workdir_case import state
from vl2jax.training.workdir import Workdir
workdir = Workdir(sys.argv[1], keep=2, keep_every=None)
for step in itertools.count((workdir.latest_step() or 0) + 1):
    params, opt_state = state(step, rows={ROWS})
    workdir.save(step, params=params, opt_state=opt_state, data_state={{"next": step}})
"""


def kill_in_mid_save(path: Path, after: int, seconds: float) -> bool:
    """Kills CHILD while it saves a step > `after`; returns whether an incomplete save is left."""
    directory = path / "checkpoints"
    with subprocess.Popen([sys.executable, "-c", CHILD, path], cwd=ROOT) as child:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            names = os.listdir(directory) if directory.is_dir() else []
            done = max((int(name) for name in names if name.isdecimal()), default=0)
            if done > after and any("tmp" in name for name in names):
                break
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
    return any("tmp" in name for name in os.listdir(directory))


def test_a_run_killed_while_saving_leaves_the_newest_complete_step(tmp_path):
    newest, torn = 0, 0
    for seconds in (0.0, 0.02, 0.05):
        torn += kill_in_mid_save(tmp_path, newest, seconds)
        with Workdir(tmp_path, keep=2, keep_every=None) as workdir:
            params, opt_state = state(0, rows=ROWS)
            step, *found, data_state = workdir.restore(
                like_params=like(params), like_opt_state=like(opt_state)
            )
            assert all(name.isdecimal() for name in listed(workdir))
        assert step > newest and data_state == {"next": step}
        assert bits(found) == bits(list(state(step, rows=ROWS)))
        newest = step
    assert torn > 0  # at least one save was interrupted


# A workdir is a model directory.


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("model") / "converted"
    to_jax.convert(data_dir / "mini-small", target)
    return target


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """A workdir: step 1 has the parameters of the converted model, step 2 their doubles."""
    path = tmp_path_factory.mktemp("run") / "run"
    model = vl2jax.load(model_dir)
    lineage.prepare(path, model.config, model_dir, dtype="float32")
    with Workdir(path, keep=5, keep_every=None) as workdir:
        for step in (1, 2):
            params = jax.tree.map(lambda x, by=step: by * x, model.params)
            workdir.save(step, params=params, opt_state={"n": jnp.int32(step)}, data_state={})
    return path


def test_a_workdir_loads_as_its_newest_step(model_dir, trained):
    model = vl2jax.load(model_dir)
    loaded = vl2jax.load(trained)
    assert loaded.config == model.config
    assert bits(loaded.params) == bits(jax.tree.map(lambda x: 2 * x, model.params))
    first = vl2jax.load(trained / "checkpoints" / "1")
    assert bits(first.params) == bits(model.params)
    assert read_model_dir(trained).step == 2
    assert read_model_dir(trained / "checkpoints" / "1").params.parts[-3:] == (
        *("checkpoints", "1", "params"),
    )


def test_a_workdir_answers_as_the_model_it_holds(model_dir, trained, capsys):
    answers = []
    for path in (model_dir, trained / "checkpoints" / "1"):
        flags = ["--prompt", "a f(x): no", "--max_new_tokens", "4", "--temperature", "0"]
        assert sample.main(["--ckpt", str(path), *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != "\n"


def test_a_workdir_is_exported_bit_for_bit(data_dir, trained, tmp_path):
    to_hf.convert(trained / "checkpoints" / "1", tmp_path / "hf")
    original = read_all(data_dir / "mini-small")
    kept = {name: x for name, x in original.items() if "attn_pool" not in name}
    assert read_all(tmp_path / "hf") == kept
    to_hf.convert(trained, tmp_path / "newest")
    to_jax.convert(tmp_path / "newest", tmp_path / "again", check=True)
    again = load_params(tmp_path / "again" / "params")
    assert bits(again) == bits(vl2jax.load(trained).params)


def test_export_in_bfloat16(trained, tmp_path):
    to_hf.convert(trained / "checkpoints" / "1", tmp_path / "hf", dtype="bfloat16")
    stored = read_all(tmp_path / "hf")
    assert {dtype for dtype, _, _ in stored.values()} == {"bfloat16"}
    newline = load_params(trained / "checkpoints" / "1" / "params")["params"]["image_newline"]
    rounded = np.asarray(newline).astype(ml_dtypes.bfloat16)
    assert stored["image_newline"] == ("bfloat16", newline.shape, rounded.tobytes())


def test_export_of_bfloat16_training_leaves_the_router_float32(tmp_path):
    to_jax.convert(write_source(tmp_path / "hf", dtype="F32"), tmp_path / "ckpt", dtype="bfloat16")
    model = read_model_dir(tmp_path / "ckpt")
    lineage.prepare(tmp_path / "run", model.config, model.path, dtype="bfloat16")
    params = load_params(model.params)
    with Workdir(tmp_path / "run", keep=1, keep_every=None) as workdir:
        workdir.save(1, params=params, opt_state=jnp.zeros(1), data_state={})
    for number, dtype in enumerate((None, "bfloat16")):
        to_hf.convert(tmp_path / "run", tmp_path / f"back{number}", dtype=dtype)
        float32 = {k for k, v in read_all(tmp_path / f"back{number}").items() if v[0] == "float32"}
        assert float32 == {
            "language.model.layers.1.mlp.gate.e_score_correction_bias",
            "language.model.layers.2.mlp.gate.e_score_correction_bias",
        }
    to_jax.convert(tmp_path / "back0", tmp_path / "again")
    assert bits(load_params(tmp_path / "again" / "params")) == bits(params)


def test_large_stacks_are_stored_in_the_pieces_that_export_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("vl2jax.checkpoints.orbax_io._SPLIT_ABOVE", 30)
    with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
        save(workdir, 1)
        assert bits(restore(workdir)[1:3]) == bits(list(state(1)))
    store = ParamStore(tmp_path / "checkpoints" / "1" / "params")
    chunks = {path: store.open(path).chunk_layout.read_chunk.shape for path in store.paths}
    assert chunks == {
        "params/decoder/moe_1/mlp/experts/up_proj": (1, 1, 8, 4),
        "params/decoder/moe_1/norm/scale": (2, 4),
        "params/image_newline": (4,),
        "router/decoder/moe_1/bias": (1, 2),
    }


def test_a_workdir_without_a_checkpoint(model_dir, tmp_path):
    lineage.prepare(tmp_path, read_model_dir(model_dir).config, model_dir)
    Workdir(tmp_path, keep=1, keep_every=None).close()
    with pytest.raises(CheckpointError, match=r"a training workdir without a complete checkpoint"):
        vl2jax.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoints/5 does not exist"):
        read_model_dir(tmp_path / "checkpoints" / "5")
    assert json.loads((tmp_path / "model.json").read_text())["dtype"] == "float32"
