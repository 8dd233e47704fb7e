"""Metrics of a training run: metrics.jsonl, TensorBoard events, and the progress line."""

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
_LARGEST = float(np.finfo(np.float32).max)

Value = float | Sequence[float] | np.ndarray


class Throughput:
    """Measures the time of steps and computes their throughput."""

    def __init__(self, devices: int, device_kind: str, dtype):
        """
        Args:
          devices: number of devices that run a step.
          device_kind: `jax.Device.device_kind`.
          dtype: dtype of the computation.
        """
        self._devices, self._peak = devices, peak_flops(device_kind, dtype)
        self.restart()

    def restart(self) -> None:
        """Starts the clock of the next step now, which excludes the time since the last step."""
        self._began = time.monotonic()

    def step(
        self, tokens: int, images: int, flops: float | None = None, data_wait: float = 0.0
    ) -> dict[str, float]:
        """Ends the clock of a step and starts that of the next one.

        Args:
          tokens: number of tokens of the step, on all devices.
          images: number of images of the step, on all devices.
          flops: FLOPs that the model needs for the step, on all devices; None: unknown.
          data_wait: seconds of the step spent waiting for the batch.

        Returns:
          `perf/...`: step_time and data_wait in seconds, tokens_per_sec, images_per_sec; with
          `flops` also tflops_per_device and, if the peak of the device is known, mfu (0 to 1).
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
    """Writes the metrics of a run and shows its progress; a context manager.

    `write` does not buffer: when it returns, `metrics.jsonl` and the event file have the metrics,
    so a killed run loses none.  A full disk is reported and does not stop the run.
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
          workdir: directory of the files; created if it does not exist.
          total_steps: number of steps of the whole run.
          start_step: step of the checkpoint that the run resumes from; metrics of later steps are
            removed.  0: a new run.
          stream: stream for the progress; None: standard error.
          every_seconds: seconds between progress lines if the stream is not a terminal.

        Raises:
          OSError: the files cannot be written.
        """
        self._workdir, self._step = Path(workdir), start_step
        self._workdir.mkdir(parents=True, exist_ok=True)
        options = {"stream": stream, "every": every_seconds, "warm_up": True}
        self._progress = Progress("training", total_steps, "steps", done=start_step, **options)
        path = self._workdir / METRICS_FILE
        removed = drop_after(path, start_step)
        if removed is not None:
            self.note(f"{path}: steps after {start_step}, up to {removed}, are removed")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by `close`
        self._events = EventWriter(self._workdir, start_step + 1 if start_step else 0)
        self._latest: dict[str, Value] = {}
        self._failed = self._closed = False

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_):
        self.close()

    def write(self, step: int, metrics: Mapping[str, Value], *, keep: bool = True) -> None:
        """Writes the metrics of a step and updates the progress.

        Args:
          step: number of the step, from 1.
          metrics: a number, or one number per layer, by name.  They are written with the precision
            of float32.  Values that are not finite become null in metrics.jsonl and are omitted
            from the events.
          keep: whether to write them to the files; False: the progress alone.
        """
        plain = {name: _plain(value) for name, value in metrics.items()}
        if keep:
            self._keep(step, plain)
        self._latest.update(plain)
        if "heldout/loss" in plain:
            self.note(f"step {step}: {_held_out(plain)}")
        if "train/loss" in plain:
            self._progress.update(step - self._step, _summary(self._latest))
            self._step = step

    def note(self, text: str) -> None:
        """Prints a line above the progress, such as "saved step 500"."""
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
        """Writes to both files; reports only the first of consecutive failures."""
        line = {"step": step} | {name: _nullable(value) for name, value in plain.items()}
        try:
            append_whole(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")
            self._events.scalars(step, _tags(plain))
            self._failed = False
        except OSError as error:
            if not self._failed:
                self.note(f"metrics of step {step} are lost, training continues: {error}")
            self._failed = True


class NoLog(contextlib.AbstractContextManager):
    """Replaces `MetricsLog` on processes other than process 0: prints notes, writes no files."""

    def __exit__(self, *_) -> None:
        """Closes nothing."""

    def write(self, step: int, metrics: Mapping[str, Value], *, keep: bool = True) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Prints a line, unless the terminal has gone."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def _plain(value: Value) -> Any:
    """Converts NumPy and JAX values to a float or a list of floats."""
    array = np.asarray(value)
    return [_short(part) for part in array] if array.ndim else _short(array[()])


def _short(value: Any) -> float:
    """The number with the fewest digits that is the same in float32; larger ones stay."""
    value = float(value)
    return float(str(np.float32(value))) if abs(value) < _LARGEST else value


def _nullable(value: Any) -> Any:
    """Replaces values that are not finite by None, because JSON does not have them."""
    if isinstance(value, list):
        return [_nullable(part) for part in value]
    return value if math.isfinite(value) else None


def _tags(metrics: Mapping[str, Value]) -> dict[str, float]:
    """Expands lists to one TensorBoard tag per layer: `name/0`, `name/1`."""
    tags = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            tags |= {f"{name}/{i}": part for i, part in enumerate(value)}
        else:
            tags[name] = value
    return tags


def _summary(metrics: Mapping[str, Value]) -> str:
    """Metrics for the progress line: `loss 1.234, acc 56.7%, 12.3k tok/s`."""
    forms = (
        ("train/loss", lambda value: f"loss {value:.4g}"),
        ("train/token_acc", lambda value: f"acc {value:.1%}"),
        ("perf/tokens_per_sec", lambda value: f"{human_count(value)} tok/s"),
    )
    return ", ".join(
        write(value) for name, write in forms if isinstance(value := metrics.get(name), float)
    )


def _held_out(metrics: Mapping[str, Value]) -> str:
    """Metrics on held-out data: `held-out loss 1.234, acc 56.7%`."""
    text = f"held-out loss {metrics['heldout/loss']:.4g}"
    if "heldout/token_acc" in metrics:
        text += f", acc {metrics['heldout/token_acc']:.1%}"
    return text
