"""Messages, reports and roll calls of many processes, with JAX's service and with a dict."""

import json
import resource
import subprocess
import sys
import threading

import jax
import pytest
from conftest import ROOT

from vl2jax.common.errors import UserError
from vl2jax.parallel import coordination
from vl2jax.parallel.coordination import Coordination, allow_connections


@pytest.mark.parametrize("end", ["regular", "lost"])
def test_many_processes_and_strays(end):
    """49 clients, and connections that are silent or speak HTTP, TLS or nonsense."""
    sizes = ["--processes", "50", "--workers", "2", "--strays", "24", "--files", "512"]
    command = [sys.executable, "benchmarks/bench_join.py", *sizes, "--end", end]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["processes"], result["end"]) == (50, end)
    assert result["open_files"] < 50 + 24 + 60  # one of each process


class Store:
    """The part of JAX's client that is used, with one dict for all processes."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()
        self.barrier = threading.Barrier(3)

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            assert len(value) <= 2**18
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout: int) -> str:
        with self.changed:
            self.changed.wait_for(lambda: key in self.values, timeout / 1000)
            return self.values[key]

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def wait_at_barrier(self, name: str, timeout: int) -> None:
        self.barrier.wait()


@pytest.fixture
def three(monkeypatch) -> list[Coordination]:
    monkeypatch.setattr(coordination, "_ROLL_CALL", 0.3)
    monkeypatch.setattr(coordination, "_DELIVERY", 0)
    store = Store()
    return [Coordination(store, index, 3) for index in range(3)]


def watched(coordinations: list[Coordination]) -> tuple[dict[int, list[int]], threading.Event]:
    """What `on_lost` of each process was called with, and an event that two were."""
    heard: dict[int, list[int]] = {}
    two = threading.Event()

    def hear(index: int, lost) -> None:
        heard[index] = list(lost)
        if len(heard) == 2:
            two.set()

    for one in coordinations:
        one.watch(lambda lost, index=one.index: hear(index, lost))
    return heard, two


def test_messages_of_any_length(three):
    texts = ["first", "ä" * 600_000, ""]
    for one, text in reversed([*zip(three, texts, strict=True)]):
        gathered = one.gather("a", text)
        assert gathered == (texts if one.index == 0 else [])
    for one in three:
        assert one.broadcast("b", texts[1] if one.index == 0 else "") == texts[1]


@pytest.mark.parametrize("failed", [0, 2])
def test_an_error_is_reported_to_the_others(three, failed):
    heard, two = watched(three)
    three[failed].report_error()
    three[failed].report_error()  # another one, maybe of another process, changes nothing
    assert two.wait(10)
    assert heard == {index: [failed] for index in range(3) if index != failed}


def test_who_does_not_answer_the_roll_is_lost(three):
    heard, two = watched(three[:2])  # process 2 was killed
    three[1].call_the_roll()
    assert two.wait(10) and heard == {0: [2], 1: [2]}


def test_who_calls_the_roll_has_failed_if_all_answer(three):
    heard, two = watched(three)
    three[1].call_the_roll()
    assert two.wait(10) and heard == {0: [1], 2: [1]}


def test_a_regular_end_is_no_loss(three):
    heard, _ = watched(three)
    ends = [threading.Thread(target=one.finish) for one in three]
    for thread in ends:
        thread.start()
    for thread in ends:
        thread.join(10)
        assert not thread.is_alive()
    assert heard == {}


@pytest.mark.parametrize(
    ("count", "limits", "wanted"),
    [
        (700, (1024, 1024), None),
        (700, (512, 1024), (956, 1024)),
        (2000, (1024, resource.RLIM_INFINITY), (2256, resource.RLIM_INFINITY)),
        (-1, (1024, 20_000), (20_000, 20_000)),
        (-1, (1024, resource.RLIM_INFINITY), (65_536, resource.RLIM_INFINITY)),
        (8, (resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_open_files_of_process_0(monkeypatch, count, limits, wanted):
    found = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, given: found.append(given))
    allow_connections(count)
    assert found == ([] if wanted is None else [wanted])


def test_too_few_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    with pytest.raises(UserError, match="process 0 of 2000 needs 2256 open files, but may have"):
        allow_connections(2000)
