"""Events during training: signals, malformed rows, metrics that are not finite, profiling."""

import dataclasses
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from vl2jax.data.unread import UnreadKeys
from vl2jax.training.feed import DeviceBatch

SKIPPED_FILE = "skipped.txt"

T = TypeVar("T")


class Skipped:
    """Writes skipped rows to a file and prints the first ones.

    Attributes:
      note: prints a line; may be replaced.
      unread: says keys of rows that are not read by `note`.
    """

    def __init__(self, path: Path | None, shown: int = 10):
        """
        Args:
          path: file to append to; None: no file.
          shown: maximum number of rows to print.
        """
        self._path, self._shown, self._count, self._failed = path, shown, 0, False
        self.note: Callable[[str], None] = functools.partial(print, file=sys.stderr)
        self.unread = UnreadKeys(lambda message: self.note(message))

    def __call__(self, message: str) -> None:
        """Records one skipped row.

        Args:
          message: names the row and the problem.
        """
        self._count += 1
        if self._path is not None:
            self._append(self._path, message)
        if self._count <= self._shown:
            where = f"in {self._path} only" if self._path else "are not shown"
            more = "" if self._count < self._shown else f" (further ones {where})"
            self.note(f"skipped {message}{more}")

    def _append(self, path: Path, message: str) -> None:
        """Writes a line to the file; a full disk is told once and does not end the run."""
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(message + "\n")
        except OSError as error:
            if not self._failed:
                self.note(f"{path} cannot be written: {error.strerror or error}")
            self._failed = True


def keep_batch(directory: Path, step: int, device_batch: DeviceBatch) -> Path:
    """Saves the batch of a failed step for inspection.

    Each process writes one file for each data shard that it read.

    Args:
      directory: directory to write to.
      step: number of the step.
      device_batch: batch of the step.

    Returns:
      Path of the first file of this process.
    """
    paths = []
    for number, packed in device_batch.packed.items():
        name = f"failed_step_{step}" + (f".shard_{number}" if number else "")
        paths.append(directory / f"{name}.npz")
        fields = dataclasses.asdict(packed.batch)
        np.savez_compressed(paths[-1], rows=packed.rows, names=np.array(packed.names), **fields)
    return paths[0]


class StopSignal:
    """Handles SIGTERM (preemption), SIGHUP (the terminal has gone) and Ctrl-C.

    The training loop saves and stops after the step.  A Ctrl-C after the first signal ends the
    process at once.  Further SIGTERM and SIGHUP are ignored, because shells and schedulers send
    them twice.  A SIGHUP that was ignored before, as by nohup, stays ignored.

    Attributes:
      requested: name of the first signal received; "" before.
    """

    def __init__(self):
        self.requested = ""
        self._waiting = False
        numbers = [signal.SIGTERM, signal.SIGINT]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
            numbers.append(hangup)
        for number in numbers:
            signal.signal(number, self._ask)
        # Python runs handlers in the main thread alone, which may compile for minutes.  The C
        # handler also writes the number of each signal to this socket at once.
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(frozenset(numbers),), daemon=True).start()

    def wait(self, call: Callable[[], T]) -> T | None:
        """Calls a function that may wait for long.

        Args:
          call: the function.

        Returns:
          Its result; None if a signal came before, or interrupted it.
        """
        try:
            self._waiting = True
            result = None if self.requested else call()
            self._waiting = False
        except _Interrupted:
            return None
        finally:
            self._waiting = False
        return result

    def _ask(self, number: int, _) -> None:
        if self.requested:
            return
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._waiting:
            raise _Interrupted

    def _watch(self, numbers: frozenset[int]) -> None:
        """Ends the process when Ctrl-C follows another signal; runs in a thread."""
        asked = False
        while received := self._read.recv(64):
            for number in received:
                if asked and number == signal.SIGINT:
                    os._exit(128 + number)
                asked |= number in numbers


class _Interrupted(BaseException):
    """Ends a wait; passes through `except Exception`."""


class Profile:
    """Writes a profiler trace of some steps, see `RunConfig.profile`."""

    def __init__(
        self,
        steps: tuple[int, int] | None,
        path: Path,
        *,
        after: int,
        last: int,
        note: Callable[[str], None],
    ):
        """
        Args:
          steps: first step, and last step + 1; None: no trace.
          path: directory of the trace.
          after: step that the run starts after.  Of a window that a restart cuts, the rest is
            traced.
          last: last step of the run.
          note: prints a line, for a window of which no step is left, and for errors.
        """
        self._path, self._note, self._tracing = path, note, False
        first, end = steps or (0, 0)
        self._first, self._end = max(first, after + 1), min(end, last + 1)
        if self._first >= self._end:
            self._first = 0
            if steps and after < last:
                run = f"this run has the steps {after + 1} to {last}"
                note(f"no trace: profile is {first}:{end}, and {run}")

    def before(self, step: int) -> None:
        """Starts the trace if this is the first step; call it before each step."""
        if step == self._first:
            self._tracing = self._attempt(lambda: jax.profiler.start_trace(str(self._path)))

    def after(self, step: int) -> None:
        """Writes the trace if this was the last step; call it after each step."""
        if step + 1 == self._end:
            self.close()

    def close(self) -> None:
        """Writes the trace of the steps so far, if there is one that is not written."""
        if self._tracing:
            self._tracing = False
            jax.effects_barrier()
            self._attempt(jax.profiler.stop_trace)

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Whether a call of the profiler went well; a failure is told and does not end the run."""
        try:
            call()
        except (OSError, RuntimeError) as error:
            self._note(f"no trace in {self._path}, training continues: {str(error)[:200]}")
            return False
        return True
