"""What reaches a run from outside: signals, malformed rows, broken numbers, a wish for traces."""

import dataclasses
import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from vl2jax.training.feed import DeviceBatch


class Skipped:
    """Counts malformed rows, lists them in a file and shows the first of them."""

    def __init__(self, path: Path, shown: int = 10):
        self._path, self._shown, self._count = path, shown, 0
        self.note: Callable[[str], None] = functools.partial(print, file=sys.stderr)

    def __call__(self, message: str) -> None:
        self._count += 1
        with self._path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")
        if self._count <= self._shown:
            more = "" if self._count < self._shown else f" (further ones in {self._path} only)"
            self.note(f"skipped {message}{more}")


def keep_batch(directory: Path, step: int, device_batch: DeviceBatch) -> Path:
    """Writes the batch of a step that failed, to be looked at; the (first) file.

    Each process writes what it read, a file for each data shard.
    """
    paths = []
    for number, packed in device_batch.packed.items():
        name = f"failed_step_{step}" + (f".shard_{number}" if number else "")
        paths.append(directory / f"{name}.npz")
        fields = dataclasses.asdict(packed.batch)
        np.savez_compressed(paths[-1], rows=packed.rows, names=np.array(packed.names), **fields)
    return paths[0]


class StopSignal:
    """SIGTERM (preemption) and Ctrl-C ask the loop to save and stop after the step.

    Attributes:
      requested: name of the signal, once it came.
    """

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once


class Profile:
    """Traces the steps of `config.profile`."""

    def __init__(self, steps: tuple[int, int] | None, path: Path):
        self._first, self._end = steps or (0, 0)
        self._path = path

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._path))

    def after(self, step: int) -> None:
        if step + 1 == self._end:
            jax.effects_barrier()
            jax.profiler.stop_trace()
