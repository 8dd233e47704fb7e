"""Progress of a long job: a bar on a terminal, plain lines now and then elsewhere."""

import os
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


def human_count(count: float) -> str:
    """Writes a number in three digits: `850`, `12.3k`, `1.2M`."""
    for unit in ("", "k", "M"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"


def human_time(seconds: float) -> str:
    """Writes a duration: `3:07`, `1:02:30`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bar(part: float, width: int = 24) -> str:
    """Draws how much is done, 0 to 1: `[######..................]`."""
    filled = int(width * min(part, 1.0))
    return f"[{'#' * filled}{'.' * (width - filled)}]"


class StatusLine:
    """A line that changes: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0):
        """
        Args:
          stream: where to write; standard error by default.
          every: seconds between lines where the stream is not a terminal.
        """
        self._stream = stream or sys.stderr
        self.is_terminal = self._stream.isatty()
        self._every = 0.1 if self.is_terminal else every
        self._shown = time.monotonic()
        self._text = ""

    def due(self, now: float) -> bool:
        """Whether it is time to show the line again, by the monotonic clock."""
        return now - self._shown >= self._every

    def show(self, text: str, now: float) -> None:
        """Shows the line, and remembers when."""
        self._shown, self._text = now, text
        self._write(self._in_place(text) if self.is_terminal else f"{text}\n")

    def note(self, text: str) -> None:
        """Prints a line that stays; on a terminal it comes above the one that changes."""
        if not self.is_terminal:
            return self._write(f"{text}\n")
        again = self._in_place(self._text) if self._text else ""
        self._write(f"\r{text}\x1b[K\n{again}")

    def end(self) -> None:
        """Leaves the line on the screen."""
        if self.is_terminal:
            self._write("\n")
            self._text = ""

    def _in_place(self, text: str) -> str:
        """The codes that put a line in the place of the last; one that wrapped would stay."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except OSError:  # no real terminal behind the stream
            columns = 0
        return f"\r{text[: columns - 1] if columns > 1 else text}\x1b[K"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


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
        self._status = StatusLine(stream, every)
        self._done = 0
        self._start = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            now = time.monotonic()
            self._status.show(self.line(now), now)
        self._status.end()

    def update(self, count: int) -> None:
        """Adds `count` bytes."""
        self._done += count
        now = time.monotonic()
        if self._status.due(now):
            self._status.show(self.line(now), now)

    def line(self, now: float) -> str:
        """The line to show at a time of the monotonic clock."""
        seconds = max(now - self._start, 1e-6)
        part = self._done / self._total if self._total else 1.0
        text = f"{self._label} {part:4.0%}"
        if self._status.is_terminal:
            text += f" {bar(part)}"
        rate = self._done / seconds
        text += f" {human_bytes(self._done)} of {human_bytes(self._total)}, {human_bytes(rate)}/s"
        if self._done >= self._total:
            return f"{text}, {human_time(seconds)}"
        left = (self._total - self._done) / rate if rate else None
        return f"{text}, {'?' if left is None else human_time(left)} left"
