"""Signals, the profiler's window, and what is saved before an error ends a run."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from vl2jax.common.errors import UserError
from vl2jax.training import loop
from vl2jax.training.events import Profile, Skipped, StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def handlers():
    """Restores the handlers of signals."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_signal_ends_a_wait_and_later_ones_are_ignored():
    stop = StopSignal()
    assert stop.wait(lambda: 3) == 3 and stop.requested == ""
    alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    alarm.start()
    assert stop.wait(queue.Queue().get) is None  # it would wait forever
    assert stop.requested == "SIGTERM"
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested == "SIGTERM"
    assert stop.wait(lambda: pytest.fail("a signal came before")) is None


@pytest.mark.usefixtures("handlers")
def test_a_hangup_that_was_ignored_stays_ignored():
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested == "" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# While the main thread is in C code, as in a compilation, Python runs no handler of signals.
BUSY = """
import hashlib
from vl2jax.training.events import StopSignal
stop = StopSignal()
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_ctrl_c_after_a_signal_leaves_at_once(first):
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # until it is in C code
        process.send_signal(getattr(signal, first))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (130, -signal.SIGINT)


class Notes(list):
    """A workdir without a checkpoint, a saving that is counted, and the lines that are printed."""

    def __init__(self, error=None):
        super().__init__()
        self.saved, self.error = 0, error

    def save(self, step):
        if self.error:
            raise self.error
        self.saved += 1

    def latest_step(self):
        return None

    def wait(self):
        pass


def rescued(notes: Notes, state) -> str:
    step = types.SimpleNamespace(number=7, state=state, saved=False)
    loop._rescue(step, notes.save, notes, notes.append)
    return "\n".join(notes)


def test_what_is_saved_before_an_error_ends_a_run(monkeypatch):
    whole = {"a": jnp.ones(3)}
    notes = Notes()
    assert rescued(notes, whole) == "" and notes.saved == 1
    gone = jax.tree.map(jnp.copy, whole)
    gone["a"].delete()
    notes = Notes()
    assert rescued(notes, gone) == (
        "step 7 is not saved: its state was given to the next step, which failed; there is no"
        " checkpoint"
    )
    assert notes.saved == 0
    for error in (UserError("train/loss is nan"), RuntimeError("train/loss is nan\nbecause")):
        assert "not saved: train/loss is nan; there" in rescued(Notes(error), whole)
    monkeypatch.setattr(loop, "wait_together", lambda name, seconds: False)
    notes = Notes()
    assert "the other processes have not stopped after it" in rescued(notes, whole)
    assert notes.saved == 0


@pytest.fixture
def traces(monkeypatch):
    """The starts and ends of traces."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("window", "after", "traced"),
    [
        ((2, 4), 0, [2, 3]),
        ((0, 2), 0, [1]),
        ((5, 15), 10, [11, 12]),  # a restart has cut it, and so does the end of the run
        ((12, 13), 10, [12]),
        ((5, 11), 10, []),
        ((13, 15), 0, []),
        (None, 0, []),
    ],
)
def test_the_part_of_a_window_that_is_left_is_traced(tmp_path, traces, window, after, traced):
    notes, found = [], []
    profile = Profile(window, tmp_path, after=after, last=12, note=notes.append)
    for step in range(after + 1, 13):
        profile.before(step)
        if traces.count("start") > traces.count("stop"):
            found.append(step)
        profile.after(step)
    profile.close()
    assert found == traced and traces == ["start", "stop"] * bool(traced)
    told = "no trace: profile is "
    assert [note.startswith(told) for note in notes] == [True] * bool(window and not traced)


def test_a_trace_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(path):
        raise RuntimeError("Profile has already been started.")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    notes = []
    profile = Profile((1, 3), tmp_path, after=0, last=5, note=notes.append)
    for step in range(1, 4):
        profile.before(step)
        profile.after(step)
    profile.close()
    assert len(notes) == 1 and notes[0].endswith("Profile has already been started.")


def test_skipped_rows_are_listed_and_counted(tmp_path):
    told = []
    skipped = Skipped(tmp_path / "skipped.txt", shown=2)
    skipped.note = told.append
    for row in range(4):
        skipped(f"a.json:{row}: bad")
    assert told == [
        "skipped a.json:0: bad",
        f"skipped a.json:1: bad (further ones in {tmp_path / 'skipped.txt'} only)",
    ]
    assert (tmp_path / "skipped.txt").read_text().count("bad\n") == 4
    loop._note_skipped(
        {"rows_read": 2000.0, "rows_skipped": 1800.0, "rows_truncated": 3.0}, tmp_path, told.append
    )
    assert told[2:] == [
        f"skipped 1,800 of 2,000 rows (90.0%), listed in {tmp_path}",
        "truncated 3 of 2,000 rows",
    ]
    loop._note_skipped(
        dict.fromkeys(("rows_read", "rows_skipped", "rows_truncated"), 0.0), tmp_path, pytest.fail
    )


def test_a_list_of_skipped_rows_that_cannot_be_written_ends_nothing(tmp_path):
    told = []
    skipped = Skipped(tmp_path, shown=5)  # a directory
    skipped.note = told.append
    skipped("a")
    skipped("b")
    assert told == [f"{tmp_path} cannot be written: Is a directory", "skipped a", "skipped b"]
