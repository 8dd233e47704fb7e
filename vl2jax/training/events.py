"""Events during training: signals, malformed rows, metrics that are not finite, profiling."""

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
    """Writes skipped rows to a file and prints the first ones.

    Attributes:
      note: prints a line; may be replaced.
    """

    def __init__(self, path: Path, shown: int = 10):
        """
        Args:
          path: file to append to.
          shown: maximum number of rows to print.
        """
        self._path, self._shown, self._count = path, shown, 0
        self.note: Callable[[str], None] = functools.partial(print, file=sys.stderr)

    def __call__(self, message: str) -> None:
        """Records one skipped row.

        Args:
          message: names the row and the problem.
        """
        self._count += 1
        with self._path.open("a", encoding="utf-8") as file:
            file.write(message + "\n")
        if self._count <= self._shown:
            more = "" if self._count < self._shown else f" (further ones in {self._path} only)"
            self.note(f"skipped {message}{more}")


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
    """Handles SIGTERM (preemption) and Ctrl-C: the training loop saves and stops after the step.

    Attributes:
      requested: name of the signal received; "" before.
    """

    def __init__(self):
        self.requested = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once


class Profile:
    """Writes a profiler trace of some steps, see `RunConfig.profile`."""

    def __init__(self, steps: tuple[int, int] | None, path: Path):
        """
        Args:
          steps: first step, and last step + 1; None: no trace.
          path: directory of the trace.
        """
        self._first, self._end = steps or (0, 0)
        self._path = path

    def before(self, step: int) -> None:
        """Starts the trace if this is the first step; call it before each step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._path))

    def after(self, step: int) -> None:
        """Writes the trace if this was the last step; call it after each step."""
        if step + 1 == self._end:
            jax.effects_barrier()
            jax.profiler.stop_trace()
