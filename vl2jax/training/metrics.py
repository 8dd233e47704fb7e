"""What a training run says of itself: metrics.jsonl, TensorBoard events, and a line of progress."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vl2jax.common.chips import peak_flops
from vl2jax.common.errors import UserError
from vl2jax.common.progress import Progress, human_count
from vl2jax.training.curves import draw_curves
from vl2jax.training.metrics_file import METRICS_FILE, drop_after
from vl2jax.training.tensorboard import EventWriter, append_whole

CURVES_FILE = "curves.png"

Value = float | Sequence[float] | np.ndarray


class Throughput:
    """Times steps, and reckons their speed."""

    def __init__(self, devices: int, device_kind: str, dtype):
        """
        Args:
          devices: that share a step.
          device_kind: as JAX names it.
          dtype: of the computation.
        """
        self._devices, self._peak = devices, peak_flops(device_kind, dtype)
        self.restart()

    def restart(self) -> None:
        """Begins to time the next step now; what came since the last one is not counted."""
        self._began = time.monotonic()

    def step(
        self, tokens: int, images: int, flops: float | None = None, data_wait: float = 0.0
    ) -> dict[str, float]:
        """Ends the timing of a step, and begins the next.

        Args:
          tokens: in the step, on all devices; so also images and flops.
          images: as above.
          flops: operations that the model needs for the step, or None.
          data_wait: the seconds of it that were spent waiting for the batch.

        Returns:
          `perf/...`: step_time and data_wait in seconds, tokens_per_sec, images_per_sec; with
          flops also tflops_per_device and, where the device's peak is known, mfu (0 to 1).
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        self.restart()
        metrics = {
            "perf/step_time": seconds,
            "perf/tokens_per_sec": tokens / seconds,
            "perf/images_per_sec": images / seconds,
            "perf/data_wait": data_wait,
        }
        if flops is not None:
            rate = flops / seconds / self._devices
            metrics["perf/tflops_per_device"] = rate / 1e12
            if self._peak is not None:
                metrics["perf/mfu"] = rate / self._peak
        return metrics


class MetricsLog:
    """Keeps the metrics of a run and shows how far it is; a context manager.

    Each call of `write` reaches `metrics.jsonl` and the event file before it returns, so that a
    kill loses nothing that was written.  A full disk is reported and does not stop the run.
    """

    def __init__(
        self,
        workdir: Path | str,
        *,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        every_seconds: float = 10.0,
    ):
        """
        Args:
          workdir: where the files go; created where absent.
          total_steps: steps of the whole run.
          start_step: the step of the checkpoint that is resumed from; what was written of later
            steps is dropped. 0 for a run that begins.
          stream: where progress goes; standard error by default.
          every_seconds: between lines where the stream is not a terminal.

        Raises:
          OSError: the files cannot be written.
        """
        self._workdir, self._step = Path(workdir), start_step
        self._workdir.mkdir(parents=True, exist_ok=True)
        options = {"stream": stream, "every": every_seconds, "warm_up": True}
        self._progress = Progress("training", total_steps, "steps", done=start_step, **options)
        path = self._workdir / METRICS_FILE
        if dropped := drop_after(path, start_step):
            self.note(f"{path}: {dropped} lines from after step {start_step} dropped")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by `close`
        self._events = EventWriter(self._workdir, start_step + 1 if start_step else 0)
        self._latest: dict[str, Value] = {}
        self._failed = self._closed = False

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Writes the metrics of a step, and shows progress when it is time.

        Args:
          step: steps done, from 1.
          metrics: name -> number, or one number per layer; what is not finite becomes null in the
            file and is left out of the events.
        """
        plain = {name: _plain(value) for name, value in metrics.items()}
        self._keep(step, plain)
        self._latest.update(plain)
        if "heldout/loss" in plain:
            self.note(f"step {step}: {_held_out(plain)}")
        if "train/loss" in plain:
            self._progress.update(step - self._step, _in_short(self._latest))
            self._step = step

    def note(self, text: str) -> None:
        """Prints a line that stays, such as "saved step 500"."""
        self._progress.note(text)

    def close(self) -> None:
        """Closes the files and draws `curves.png`; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._latest:
            self._progress.close()
        self._file.close()
        self._events.close()
        try:
            draw_curves(self._workdir / METRICS_FILE, self._workdir / CURVES_FILE)
        except (OSError, UserError) as error:
            self.note(f"{CURVES_FILE} was not drawn: {error}")

    def _keep(self, step: int, plain: dict[str, Any]) -> None:
        """Writes to both files; complains once if that fails, until it works again."""
        line = {"step": step} | {name: _nullable(value) for name, value in plain.items()}
        try:
            append_whole(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")
            self._events.scalars(step, _tags(plain))
            self._failed = False
        except OSError as error:
            if not self._failed:
                self.note(f"metrics of step {step} are lost, training goes on: {error}")
            self._failed = True


class NoLog(contextlib.AbstractContextManager):
    """What other processes than the first keep: nothing; only notes reach standard error."""

    def __exit__(self, *_) -> None:
        """Closes nothing."""

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr)


def _plain(value: Value) -> Any:
    """A float, or a list of floats, from what NumPy or JAX hold."""
    return np.asarray(value, np.float64).tolist()


def _nullable(value: Any) -> Any:
    """What is not finite as None, which JSON can hold."""
    if isinstance(value, list):
        return [_nullable(part) for part in value]
    return value if math.isfinite(value) else None


def _tags(metrics: Mapping[str, Value]) -> dict[str, float]:
    """Lists as one tag per layer: `name/0`, `name/1`."""
    tags = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            tags |= {f"{name}/{i}": part for i, part in enumerate(value)}
        else:
            tags[name] = value
    return tags


def _in_short(metrics: Mapping[str, Value]) -> str:
    """What the line of progress says: `loss 1.234, acc 56.7%, 12.3k tok/s`."""
    forms = (
        ("train/loss", lambda value: f"loss {value:.4g}"),
        ("train/token_acc", lambda value: f"acc {value:.1%}"),
        ("perf/tokens_per_sec", lambda value: f"{human_count(value)} tok/s"),
    )
    return ", ".join(
        write(value) for name, write in forms if isinstance(value := metrics.get(name), float)
    )


def _held_out(metrics: Mapping[str, Value]) -> str:
    """Says how held-out data fare: `held-out loss 1.234, acc 56.7%`."""
    text = f"held-out loss {metrics['heldout/loss']:.4g}"
    if "heldout/token_acc" in metrics:
        text += f", acc {metrics['heldout/token_acc']:.1%}"
    return text
