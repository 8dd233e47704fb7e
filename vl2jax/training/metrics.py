"""What a training run says of itself: metrics.jsonl, TensorBoard events, and a line of progress."""

import collections
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.common.progress import StatusLine, bar, human_count, human_time
from vl2jax.training.curves import draw_curves, parse_line, read_metrics
from vl2jax.training.tensorboard import EventWriter, append_whole

__all__ = ["MetricsLog", "NoLog", "Throughput", "drop_after", "peak_flops", "read_metrics"]

METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
_RATE_OVER = 60.0  # seconds that the time left is reckoned from

# Dense bfloat16 operations per second of one device, from the makers' data sheets; the more
# special name first.
_PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H200 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
)

Value = float | Sequence[float] | np.ndarray


def peak_flops(device_kind: str, dtype) -> float | None:
    """The most operations a device can do in a second on dense matrices.

    Args:
      device_kind: as JAX names it, "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: of the computation; only 16-bit types have one peak whatever the precision asked for.

    Returns:
      Operations per second, or None where it is not known.
    """
    if str(getattr(dtype, "__name__", dtype)) not in ("bfloat16", "float16"):
        return None
    if re.search(r"\bMIG\b", device_kind):  # a part of a device
        return None
    found = (peak for name, peak in _PEAKS if re.search(rf"\b{name}\b", device_kind))
    return next(found, None)


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


def drop_after(path: Path, step: int) -> int:
    """Drops from a metrics file what a run wrote after a step, at once or not at all.

    Lines that cannot be read go too: a killed run may leave one.

    Args:
      path: a metrics.jsonl, or nothing yet.
      step: the last to keep; 0 for a run that begins, which keeps none.

    Returns:
      How many lines were dropped.

    Raises:
      OSError: the file cannot be rewritten; it stays as it was.
    """
    if not path.exists():
        return 0
    dropped, torn = 0, False
    beside = path.with_name(path.name + ".new")
    with open(path, "rb") as old, open(beside, "wb") as new:
        for text in old:
            line = parse_line(text)
            if step > 0 and line is not None and line["step"] <= step:
                new.write(text.rstrip(b"\n") + b"\n")
                torn |= not text.endswith(b"\n")
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if dropped or torn:
        os.replace(beside, path)
    else:
        beside.unlink()
    return dropped


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
        self._workdir, self._total, self._step = Path(workdir), total_steps, start_step
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._status = StatusLine(stream, every_seconds)
        path = self._workdir / METRICS_FILE
        if dropped := drop_after(path, start_step):
            self.note(f"{path}: {dropped} lines from after step {start_step} dropped")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by `close`
        self._events = EventWriter(self._workdir, start_step + 1 if start_step else 0)
        self._start = time.monotonic()
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._latest: dict[str, Value] = {}
        self._line = ""
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
        self._step = max(self._step, step)
        self._latest.update(plain)
        if "heldout/loss" in plain:
            self.note(f"step {step}: {_held_out(plain)}")
        if "train/loss" in plain:
            self._advance(step)

    def note(self, text: str) -> None:
        """Prints a line that stays, such as "saved step 500"."""
        self._status.note(text)

    def line(self, now: float) -> str:
        """The line of progress at a time of the monotonic clock."""
        text = f"step {self._step}/{self._total}"
        if self._status.is_terminal:
            text += f" {bar(self._step / max(self._total, 1))}"
        for name, write in (
            ("train/loss", lambda value: f" loss {value:.4g}"),
            ("train/token_acc", lambda value: f" acc {value:.1%}"),
            ("perf/tokens_per_sec", lambda value: f" {human_count(value)} tok/s"),
        ):
            if isinstance(value := self._latest.get(name), float):
                text += write(value)
        if self._step >= self._total:
            return f"{text} in {human_time(now - self._start)}"
        left = self._time_left()
        return f"{text} {'?' if left is None else human_time(left)} left"

    def close(self) -> None:
        """Closes the files and draws `curves.png`; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._latest:
            now = time.monotonic()
            if self.line(now) != self._line:
                self._status.show(self.line(now), now)
            self._status.end()
        self._file.close()
        self._events.close()
        try:
            draw_curves(self._workdir / METRICS_FILE, self._workdir / CURVES_FILE)
        except (OSError, UserError) as error:
            self.note(f"{CURVES_FILE} was not drawn: {error}")

    def _keep(self, step: int, plain: dict[str, Value]) -> None:
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

    def _advance(self, step: int) -> None:
        """Takes the time of a step, and shows the line if it is the first, the last, or due."""
        now = time.monotonic()
        first = not self._marks
        self._marks.append((now, step))
        while len(self._marks) > 2 and self._marks[1][0] < now - _RATE_OVER:
            self._marks.popleft()
        if first or step >= self._total or self._status.due(now):
            self._line = self.line(now)
            self._status.show(self._line, now)

    def _time_left(self) -> float | None:
        """Seconds to the end at the rate of late; the first step, which compiles, is left out."""
        if len(self._marks) < 2:
            return None
        (begin, low), (end, high) = self._marks[0], self._marks[-1]
        return (self._total - self._step) * (end - begin) / max(high - low, 1)


class NoLog(contextlib.AbstractContextManager):
    """What other processes than the first keep: nothing; only notes reach standard error."""

    def __exit__(self, *_) -> None:
        """Closes nothing."""

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Prints a line."""
        print(text, file=sys.stderr)


def _plain(value: Value) -> Value:
    """A float, or a list of floats, from what NumPy or JAX hold."""
    return np.asarray(value, np.float64).tolist()


def _nullable(value: Value) -> Value | None:
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


def _held_out(metrics: Mapping[str, Value]) -> str:
    """Says how held-out data fare: `held-out loss 1.234, acc 56.7%`."""
    text = f"held-out loss {metrics['heldout/loss']:.4g}"
    if "heldout/token_acc" in metrics:
        text += f", acc {metrics['heldout/token_acc']:.1%}"
    return text
