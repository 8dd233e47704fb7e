"""Progress of a long job over bytes: a bar on a terminal, plain lines now and then elsewhere."""

import sys
import time
from typing import TextIO


def human_bytes(count: float) -> str:
    """Writes a number of bytes as people read it: `6.74 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_time(seconds: float) -> str:
    """Writes a duration: `3:07`, `1:02:30`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Counts bytes towards a total and shows how far, how fast, and how long it will take.

    Use it as a context manager: the last line stays on the screen.
    """

    def __init__(self, label: str, total: int, stream: TextIO | None = None, every: float = 10.0):
        """
        Args:
          label: what is being done.
          total: bytes to come.
          stream: where to write; standard error by default.
          every: seconds between lines where the stream is not a terminal.
        """
        self._label, self._total = label, total
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._every = 0.1 if self._is_terminal else every
        self._done = 0
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._show(time.monotonic())
        if self._is_terminal:
            self._stream.write("\n")
            self._stream.flush()

    def update(self, count: int) -> None:
        """Adds `count` bytes."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= self._every:
            self._show(now)

    def line(self, now: float) -> str:
        """The line to show at a time of the monotonic clock."""
        seconds = max(now - self._start, 1e-6)
        part = self._done / self._total if self._total else 1.0
        text = f"{self._label} {part:4.0%}"
        if self._is_terminal:
            filled = int(24 * min(part, 1.0))
            text += f" [{'#' * filled}{'.' * (24 - filled)}]"
        rate = self._done / seconds
        text += f" {human_bytes(self._done)} of {human_bytes(self._total)}, {human_bytes(rate)}/s"
        if self._done >= self._total:
            return f"{text}, {human_time(seconds)}"
        left = (self._total - self._done) / rate if rate else None
        return f"{text}, {'?' if left is None else human_time(left)} left"

    def _show(self, now: float) -> None:
        self._shown = now
        line = self.line(now)
        self._stream.write(f"\r{line}\x1b[K" if self._is_terminal else f"{line}\n")
        self._stream.flush()
