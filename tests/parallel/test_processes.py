"""Tests of a training run of two processes with four devices each, started by the command line.

VL2JAX_PROCESSES=all also runs the long tests: twenty steps equal those of a single process, restore
on other numbers of devices, and a restart after SIGKILL.
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import processes
import pytest
from conftest import ROOT
from processes import assert_names_lost, finish, free_port, long_test

from vl2jax.checkpoints.completeness import complete_steps
from vl2jax.checkpoints.param_store import ParamStore, read_array
from vl2jax.common.errors import UserError
from vl2jax.data.reading import mixed_order
from vl2jax.parallel.processes import DistributedOptions
from vl2jax.training.metrics_file import read_metrics

FLAGS = [
    "--config=tests/smallest.py",
    f"--compilation_cache={ROOT / '.cache' / 'train'}",
    "--config.batch.rows=8",
    "--config.batch.tiles=64",
    "--config.mesh.data=2",
    "--config.mesh.expert=2",
    "--config.mesh.tensor=2",
    "--config.data.shards=2",
    "--config.eval.every=0",
    "--config.optim.eps=1e-3",  # otherwise rounding errors of gradients near 0 give full updates
]


def start(workdir, devices: int, *arguments: str) -> subprocess.Popen:
    return processes.start("train.py", devices, *FLAGS, f"--workdir={workdir}", *arguments)


def start_two(workdir, *arguments: str, second: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    flags = [*FLAGS, f"--workdir={workdir}", *arguments]
    return processes.start_two("train.py", 4, *flags, second=second)


def curve(workdir) -> np.ndarray:
    rows = read_metrics(workdir / "metrics.jsonl")
    names = ("step", "train/loss", "train/grad_norm", "data/token_fill", "data/tile_imbalance")
    return np.array([[row[name] for name in names] for row in rows if names[1] in row])


def heldout(workdir) -> list[tuple[float, float]]:
    rows = read_metrics(workdir / "metrics.jsonl")
    names = ("heldout/loss", "heldout/token_acc")
    return [tuple(row[name] for name in names) for row in rows if names[0] in row]


def saved(workdir, step: int) -> dict[str, np.ndarray]:
    stores = {name: ParamStore(workdir / "checkpoints" / str(step) / name) for name in PARTS}
    return {
        f"{name}/{path}": read_array(store.open(path))
        for name, store in stores.items()
        for path in store.paths
    }


PARTS = ("params", "opt_state")


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys() and len(want) > 50
    for path, value in want.items():
        error, size = np.linalg.norm(got[path] - value), np.linalg.norm(value)
        assert error <= 1e-5 * size + 1e-7, f"{path}: {error} of {size}"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same run with two processes and with one."""
    steps = 20
    options = (f"--config.steps={steps}", f"--config.checkpoint.every={-(-steps // 2)}")
    options += ("--config.eval.every=10", "--config.eval.batches=3")
    two, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    ended = finish(*start_two(two, *options))
    assert [code for code, *_ in ended] == [0, 0], ended
    ended += finish(start(one, 8, *options))
    assert ended[-1][0] == 0, ended[-1]
    return two, one, steps, ended


@long_test
def test_two_processes_equal_one(both):
    two, one, steps, ended = both
    np.testing.assert_allclose(curve(two), curve(one), rtol=1e-5, atol=1e-6)
    assert curve(two)[:, 0].tolist() == list(range(1, steps + 1))
    scores = [heldout(workdir) for workdir in (two, one)]
    assert len(scores[0]) == 2
    np.testing.assert_allclose(*scores, rtol=1e-5)
    assert complete_steps(two)[-1] == steps
    assert_same(saved(two, steps), saved(one, steps))
    # The second process writes neither metrics nor progress.
    assert "devices  8 cpu" in ended[0][1] and "devices " not in ended[1][1]
    assert "1 of 20 steps" in ended[0][2] and "of 20 steps" not in ended[1][2]


@long_test
def test_saved_data_is_that_of_both(both):
    """A checkpoint has the state of all data shards, so any number of processes can resume."""
    two, one, steps, _ = both
    states = []
    for workdir in (two, one):
        file = workdir / "checkpoints" / str(steps) / "data" / "metadata"
        states.append(json.loads(file.read_text()))
    assert states[0] == states[1] and len(states[0]["shards"]) == 2
    assert [s["data"]["process"] for s in states[0]["shards"]] == [[0, 2], [1, 2]]


def test_another_configuration_in_one_process(tmp_path):
    started = start_two(tmp_path, second=("--config.optim.lr=0.5",))
    (code0, _, errors0), (code1, output1, errors1) = finish(*started)
    assert code0 == code1 == 1 and "devices " not in output1
    assert (
        "error: process 1 was started with config different from process 0's: config.optim.lr"
        " is 0.5, but 0.001 on process 0; start all processes with the same command"
    ) in errors1
    assert "error: process 1 of 2 has ended, so process 0 ends too" in errors0
    assert not (tmp_path / "checkpoints").exists() or not complete_steps(tmp_path)


def test_a_process_that_does_not_come(tmp_path):
    """Connections that are not of the run neither end nor hold the wait."""
    port = free_port()
    join = [f"--coordinator=localhost:{port}", "--num_processes=2", "--join_timeout=6"]
    process = start(tmp_path, 4, *join, "--process_id=0")
    with contextlib.ExitStack() as stack:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"1"):
            stray = stack.enter_context(_connect(port, process))
            stray.sendall(said)
        ((code, _, errors),) = finish(process)
    assert code == 1
    assert "error: process 0 waited 6 s and not all 2 processes came together" in errors


def _connect(port: int, process: subprocess.Popen) -> socket.socket:
    """Connects as soon as the process listens."""
    while process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", port))
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def test_a_taken_port(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        join = [f"--coordinator=localhost:{port}", "--num_processes=2", "--process_id=0"]
        ((code, _, errors),) = finish(start(tmp_path, 4, *join))
    assert code == 1 and "Traceback" not in errors
    assert f"error: process 0 cannot use the port {port} of --coordinator on its host" in errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator needs --num_processes and --process_id"),
        ({"num_processes": 2}, "need --coordinator=HOST:PORT"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1"),
    ],
)
def test_flags_that_need_each_other(given, message):
    with pytest.raises(UserError, match=message):
        DistributedOptions(**given)


@long_test
@pytest.mark.parametrize("devices", [1, 8])
def test_restored_by_one_process(both, tmp_path, devices):
    """A checkpoint of two processes, resumed on one or eight devices, equals a one-process run."""
    two, one, steps, _ = both
    copy = tmp_path / "run"
    shutil.copytree(two, copy)
    shutil.rmtree(copy / "checkpoints" / str(steps))
    axes = ("data", "expert", "tensor")
    mesh = [f"--config.mesh.{axis}=1" for axis in axes] if devices == 1 else []
    ((code, output, errors),) = finish(start(copy, devices, f"--config.steps={steps}", *mesh))
    assert code == 0, errors
    assert f"resumed  from step {-(-steps // 2)}" in output
    names = slice(0, 4)  # without the tile imbalance, which one device does not have
    np.testing.assert_allclose(curve(copy)[:, names], curve(one)[:, names], rtol=1e-5, atol=1e-6)
    assert_same(saved(copy, steps), saved(one, steps))


@long_test
def test_killed_and_started_again(both, tmp_path):
    """SIGKILL of one process ends the other with an error; restarted runs equal an unkilled run.

    They are bitwise equal to an unkilled run of two processes.  A run of one process differs in the
    last digits of float32, because gloo sums over processes in another order than XLA sums over the
    devices of one process.
    """
    two, _, steps, _ = both
    options = (f"--config.steps={steps}", "--config.checkpoint.every=5")
    for victim in (1, 0):
        started = start_two(tmp_path, *options)
        while not any(step >= (5 if victim else 10) for step in complete_steps(tmp_path)):
            assert all(process.poll() is None for process in started)
            time.sleep(0.02)
        started[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        ended = finish(*started)
        assert time.monotonic() - killed < 60  # heartbeats: 30
        assert ended[victim][0] == -signal.SIGKILL
        if victim:
            assert_names_lost(ended[0], victim)
        else:  # the service has ended with process 0, so JAX ends process 1
            assert ended[1][0] == -signal.SIGABRT and "Either the leader task" in ended[1][2]
    ended = finish(*start_two(tmp_path, *options))
    assert [code for code, *_ in ended] == [0, 0], ended
    np.testing.assert_array_equal(curve(tmp_path), curve(two))
    got, want = saved(tmp_path, steps), saved(two, steps)
    assert got.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


@long_test
def test_a_process_that_cannot_read_on_stops_all_with_a_checkpoint(tmp_path):
    """A malformed row of one data shard; both processes save the step before the error."""
    rows: list[dict] = [{"text": f"Document {number}. " * 6} for number in range(400)]
    split = dict(process_index=1, process_count=2)
    order = mixed_order([range(400)], [1.0], seed=0, shuffle=True, repeat=True, **split)
    rows[order[120][1]] = {"messages": [{"role": "robot", "content": "a"}]}
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = (f"--config.data.train={tmp_path / 'data.jsonl'}", "--config.steps=40")
    run = tmp_path / "run"
    ended = finish(*start_two(run, *options, "--config.checkpoint.every=100"))
    assert [code for code, *_ in ended] == [1, 1], ended
    (step,) = complete_steps(run)
    assert 0 < step < 40 and f"saved step {step}" in ended[0][2]
    assert f"another process: stopped after step {step}" in ended[0][2]
    assert f"error: {tmp_path}/data.jsonl:{order[120][1] + 1}: message 1: unknown" in ended[1][2]
    assert curve(run)[:, 0].tolist() == list(range(1, step + 1))
