"""train.py as a user runs it: a full run, killed and stopped runs, divergence, user errors."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest
import smallest
from train_case import curve, final_state, started, train

from vl2jax.checkpoints.completeness import complete_steps
from vl2jax.checkpoints.model_dir import flatten, load_params
from vl2jax.common.errors import UserError
from vl2jax.data.reading import mixed_order
from vl2jax.parallel.sharding import make_mesh
from vl2jax.programs import train as train_program
from vl2jax.synthetic import question
from vl2jax.training.metrics_file import read_metrics
from vl2jax.training.run_config import read_run_config
from vl2jax.training.workdir import Workdir

KILLS = int(os.environ.get("VL2JAX_KILLS", "2"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run of six steps with a checkpoint every two."""
    workdir = tmp_path_factory.mktemp("run")
    done = train(workdir, "--config.profile=2:4")
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_what_a_run_leaves(run):
    workdir, done = run
    first = done.stdout.splitlines()
    assert [line.split()[0] for line in first] == [
        *("devices", "mesh", "model", "memory", "step", "run", "data")
    ]
    assert "1 cpu" in first[0] and "data 1, fsdp 1, expert 1, tensor 1" in first[1]
    assert "6 steps, 2,880 tokens" in first[5]
    every = read_metrics(workdir / "metrics.jsonl")
    rows = [row for row in every if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "token_acc", "grad_norm", "lr", "aux_loss"):
        assert all(np.isfinite(row[f"train/{name}"]) for row in rows)
    for name in ("max_violation", "entropy", "dead_experts", "bias_norm"):
        assert len(rows[0][f"moe/{name}"]) == 1  # one MoE layer
    for name in ("step_time", "tokens_per_sec", "images_per_sec", "tflops_per_device", "data_wait"):
        assert rows[-1][f"perf/{name}"] >= 0
    assert [row["step"] for row in every if "heldout/loss" in row] == [3, 6]
    assert rows[0]["train/loss"] == pytest.approx(np.log(1536), rel=0.1)
    assert complete_steps(workdir) == [4, 6]  # keep = 2
    assert json.loads((workdir / "config.json").read_text())["steps"] == 6
    (start,) = (workdir / "configs").iterdir()
    assert start.name.startswith("00000000-")
    assert start.read_bytes() == (workdir / "config.json").read_bytes()
    assert (workdir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list(workdir.glob("events.out.tfevents.*")) and list(workdir.rglob("*.xplane.pb"))
    assert "held-out loss" in done.stderr and "6 of 6 steps" in done.stderr
    assert [f"saved step {step}" in done.stderr for step in (2, 3, 4, 6)] == [1, 0, 1, 1]


def test_killed_at_any_moment(tmp_path):
    """After SIGKILL during a step or a save, parameters and losses are the same, bit for bit."""
    steps, dice = 30 + 5 * KILLS, random.Random(0)
    often = ("--config.checkpoint.every=5", "--config.eval.every=0", f"--config.steps={steps}")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert train(whole, *often).returncode == 0
    in_a_save = 0
    for life in range(KILLS):
        process = started(torn, *often)
        with contextlib.suppress(StopIteration):
            _wait(torn, process, life, dice)
        in_a_save += any(torn.rglob("*.orbax-checkpoint-tmp*"))
        process.kill()
        process.wait()
    done = train(torn, *often)
    assert done.returncode == 0, done.stderr
    assert KILLS < 2 or in_a_save
    assert curve(torn) == curve(whole)
    want, got = final_state(whole, steps), final_state(torn, steps)
    assert want.keys() == got.keys() and len(want) > 50
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def _wait(workdir, process, life: int, dice: random.Random) -> None:
    """Waits until the run has trained for a random time, or, in odd lives, until it saves."""
    metrics = workdir / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    while process.poll() is None:
        time.sleep(0.002)
        if life % 2 and any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
            return
        if not life % 2 and metrics.exists() and metrics.stat().st_size != before:
            time.sleep(dice.uniform(0, 0.5))
            return
    raise StopIteration


@pytest.mark.parametrize(
    ("name", "evaluation"), [("SIGTERM", ("every", 0)), ("SIGHUP", ("batches", 10_000))]
)
def test_a_signal_saves_and_ends(tmp_path, name, evaluation):
    """Also in an evaluation, which has not the time to end; a SIGHUP that comes twice is one."""
    long = ("--config.steps=100000", "--config.checkpoint.every=100000", "--config.eval.every=2")
    long += ("--config.log_every=1",)
    process = started(tmp_path, *long, "--config.eval.{}={}".format(*evaluation))
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(getattr(signal, name))
    assert process.wait(timeout=60) == 0
    steps = [step for step, *_ in curve(tmp_path)]
    assert complete_steps(tmp_path) == steps[-1:] and steps == list(range(1, steps[-1] + 1))
    assert not any("heldout/loss" in row for row in read_metrics(metrics))


def test_broken_numbers(run, tmp_path):
    """A run that diverges stops, names the step and the rows, and keeps its checkpoints."""
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    wild = ("--config.optim.lr=1000", "--config.optim.weight_decay=1000")
    done = train(tmp_path, "--config.steps=12", *wild, "--config.checkpoint.every=99")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: train/") and "newest checkpoint: step 6" in message
    (kept,) = tmp_path.glob("failed_step_*.npz")
    step = int(kept.stem.split("_")[-1])
    assert f"at step {step}," in message and 7 <= step <= 11 and str(kept) in message
    assert message.endswith(f"go on without them: --config.data.skip_batches={step}")
    arrays = np.load(kept)
    assert str(arrays["names"][0]) in message and "synthetic train row" in message
    assert arrays["tokens"].shape == (1, 2, 240)
    assert complete_steps(tmp_path) == [4, 6]


def test_a_malformed_row_ends_the_run_with_what_it_has(tmp_path):
    """The newest step is saved, and the error names the way on, which is then taken."""
    rows: list[dict] = [{"text": f"Document {number}. " * 6} for number in range(200)]
    order = mixed_order([range(200)], [1.0], seed=0, shuffle=True, repeat=True)
    rows[order[80][1]] = {"messages": [{"role": "robot", "content": "a"}]}
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = (f"--config.data.train={tmp_path / 'data.jsonl'}", "--config.data.heldout=")
    flags += ("--config.checkpoint.every=100", "--config.steps=12")
    done = train(tmp_path / "run", *flags)
    assert done.returncode == 1
    *lines, error = done.stderr.splitlines()
    (step,) = complete_steps(tmp_path / "run")
    assert 0 < step < 12 and f"saved step {step}" in lines
    assert error.startswith(f"error: {tmp_path}/data.jsonl:{order[80][1] + 1}: message 1: unknown")
    assert error.endswith("set --config.data.on_error=skip to train without it")
    assert [number for number, *_ in curve(tmp_path / "run")] == list(range(1, step + 1))
    sparse = ("--config.data.on_error=skip", "--config.log_every=5")
    done = train(tmp_path / "run", *flags, *sparse)
    assert done.returncode == 0 and f"resumed  from step {step}" in done.stdout
    assert complete_steps(tmp_path / "run") == [step, 12]
    *_, last = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert last["data/skipped"] == 1 and "skipped 1 of " in done.stderr
    assert "unknown role" in (tmp_path / "run" / "skipped.txt").read_text()
    # The first step of a start and what is saved are written beside every fifth.
    written = [number for number, *_ in curve(tmp_path / "run")][step:]
    assert written == sorted({step + 1, 12, *(n for n in (5, 10) if n > step)})


def test_preview(tmp_path):
    done = train(tmp_path, "--config.data.preview=3")
    assert done.returncode == 0, done.stderr
    assert "sample 3" in done.stdout and "⟦" in done.stdout and "<image: " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


def content(directory) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def attempt(monkeypatch):
    """`attempt(path, change)`: starts training in this process with a changed configuration."""
    monkeypatch.setattr(train_program, "set_compilation_cache", lambda directory: None)
    monkeypatch.setattr(train_program, "FLAGS", types.SimpleNamespace(compilation_cache=None))
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, jax.devices()[:1])

    def start(path, change=lambda config: None):
        config = smallest.get_config()
        change(config)
        with jax.set_mesh(mesh):
            return train_program.run_on_mesh(read_run_config(config.to_dict()), path, mesh)

    return start


def _other_rows(config):
    config.data.shards = 3


def _other_seed(config):
    config.seed, config.optim.lr = 5, 0.5


def _other_moments(config):
    config.optim.moments_dtype = "bfloat16"


def _other_model(config):
    config.model.language_config.num_experts_per_tok = 1


def _preview(config):
    config.data.preview = 1


def _dry_run(config):
    config.dry_run = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_rows, "data.shards is 3, but the checkpoint was saved with 1"),
        (_other_seed, "the data differs from the checkpoint's: seed was 0, now 5"),
        (_other_moments, "does not match the configuration of this run"),
        (_other_model, "is of another model"),
        (_preview, ""),
        (_dry_run, ""),
    ],
)
def test_a_start_that_is_refused_or_only_shows_writes_nothing(
    run, tmp_path, attempt, capsys, change, message
):
    path = tmp_path / "run"
    shutil.copytree(run[0], path)
    before = content(path)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        attempt(path, change)
    after = content(path)
    assert bool(after.pop("preview.png", None)) == (change is _preview)
    assert after == before
    if change is _other_seed:  # what has changed is told before the refusal
        said = capsys.readouterr().out.splitlines()
        assert {"changed  seed: 0 -> 5", "changed  optim.lr: 0.001 -> 0.5"} <= set(said)


def test_a_second_run_writes_nothing(run, tmp_path, attempt):
    path = tmp_path / "run"
    shutil.copytree(run[0], path)
    with Workdir(path, keep=2, keep_every=None):
        before = content(path)
        with pytest.raises(UserError, match="another run is training in"):
            attempt(path)
        assert content(path) == before


@pytest.mark.usefixtures("quick_compilation")
def test_a_new_run_that_is_refused_leaves_nothing(tmp_path, attempt):
    def no_such_data(config):
        config.data.train = str(tmp_path / "none.jsonl")

    with pytest.raises(UserError, match=r"none\.jsonl"):
        attempt(tmp_path / "run", no_such_data)
    assert not (tmp_path / "run").exists()


def test_a_directory_of_something_else_is_not_overwritten(tmp_path, attempt):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a workdir, and its config\.json would be"):
        attempt(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_dry_run_of_the_released_sizes(tmp_path, size):
    """A dry run allocates nothing; activated parameters are those of the paper."""
    activated = {"tiny": 0.574e9, "small": 2.451e9, "base": 4.124e9}[size]
    stage = {"tiny": "align", "small": "sft", "base": "pretrain"}[size]
    config = f"configs/vl2_{size}.py:{stage}"
    done = train(tmp_path / "no", "--config.dry_run=True", config=config)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    decoder = int(lines["model"].split("(")[1].split()[0].replace(",", ""))
    assert decoder == pytest.approx(activated, rel=1e-3)
    total, trained = (
        int(part.split()[0].replace(",", "")) for part in lines["model"][9:].split(", ")[:2]
    )
    assert (trained == total) == (stage != "align")
    assert ("bfloat16" in lines["memory"].split("optimizer")[1]) == (size == "base")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/none.py"], "--config configs/none.py does not exist; expected a file"),
        (["--config=configs/vl2_tiny.py:last"], "vl2_tiny has the stages align, pretrain, sft"),
        (
            ["--config.optim.learning=1"],
            "config.optim has no field 'learning'; it has algorithm, b1",
        ),
        (["--config.optim.warmup_step=1"], "did you mean 'warmup_steps'?"),
        (["--config.optim.lr=fast"], "could not convert string to float: 'fast'"),
        (["--config.mesh.data=7"], "mesh {'data': 7, 'fsdp': 1, 'expert': 1, 'tensor': 1}"),
        (["--config.init_from=/nowhere"], "checkpoint /nowhere does not exist"),
        (["--config.data.train=/nowhere.json"], "/nowhere.json"),
        (["--config.batch.length=40"], "raise config.batch.length to"),
        (["--wordkir=a"], "Did you mean: workdir"),
        (["something"], "'something' is not a flag"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    """A user error is one line without traceback; the exit code is 1."""
    done = train(tmp_path / "run", *arguments)
    assert done.returncode == 1, done.stdout
    errors = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert message in errors[-1] and errors[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not complete_steps(tmp_path / "run")


def _llava_row(directory: pathlib.Path, number: int) -> dict:
    """One short question about its own image, in the format of LLaVA."""
    family = ("colour", "count", "digit", "shape")[number % 4]
    asked = question(family, number, split="train")
    asked.row.images[0].save(directory / f"{number}.png")
    turns = [("human", asked.row.messages[0]["content"]), ("gpt", asked.answer)]
    return {
        "id": str(number),
        "image": f"{number}.png",
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }


def test_fine_tuning(mini, tmp_path):
    """A converted checkpoint overfits 32 conversations; export and conversion restore it."""
    from convert import to_hf, to_jax

    source = mini("mini-small").source
    to_jax.convert(source, tmp_path / "start")
    rows = [_llava_row(tmp_path, number) for number in range(32)]
    (tmp_path / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = {
        "init_from": tmp_path / "start",
        "data.train": tmp_path / "data.json",
        "steps": 70,
        "batch.rows": 1,
        "batch.length": 1024,
        "batch.tiles": 72,
        "batch.segments": 32,
        "batch.microbatches": 1,
        "compute.dtype": "float32",
        "compute.remat": "none",
        "optim.lr": 3e-3,
        "checkpoint.every": 1000,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    done = train(tmp_path / "run", *flags, config="configs/finetune.py")
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["train/token_acc"] < 0.3 and rows[-1]["train/token_acc"] == 1.0
    to_hf.convert(tmp_path / "run", tmp_path / "export")
    to_jax.convert(tmp_path / "export", tmp_path / "again")
    want = flatten(load_params(tmp_path / "run" / "checkpoints" / "70" / "params"))
    got = flatten(load_params(tmp_path / "again" / "params"))
    assert want.keys() == got.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value), err_msg=path)
