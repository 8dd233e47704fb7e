"""Progress of a long job: a progress bar on a terminal, periodic plain lines elsewhere."""

import collections
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

_BAR = 24  # characters of the bar if the terminal is wide enough
_RATE_OVER = 60.0  # seconds over which the rate is averaged


def human_bytes(count: float) -> str:
    """Formats a number of bytes: `6.74 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_count(count: float, digits: int = 3) -> str:
    """Formats a number with `digits` significant digits: `850`, `12.3k`, `1.2M`."""
    for unit in ("", "k", "M"):
        if abs(count) < 999.5:
            return f"{count:.{digits}g}{unit}"
        count /= 1000
    return f"{count:.{digits}g}G"


def human_time(seconds: float) -> str:
    """Formats a duration: `3:07`, `1:02:30`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """Shows the progress of a job, its rate, and the estimated time left.

    On a terminal it shows one line with a bar, updated in place; elsewhere it prints a line every
    few seconds.  Use it as a context manager: when the block ends, the final state is shown, unless
    the block raised an error.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "bytes",
        *,
        done: int = 0,
        warm_up: bool = False,
        stream: TextIO | None = None,
        every: float = 10.0,
    ):
        """Starts the clock; nothing is shown yet.

        Args:
          label: name of the job.
          total: amount of work, including `done`.
          unit: name of what is counted; for "bytes" the rate is shown too.
          done: amount of work that was done before this job started.
          warm_up: whether the first update is slower than the others because it compiles.  Then it
            is shown immediately, and the time left is estimated from the later updates alone.
          stream: where to write; None: standard error.
          every: seconds between lines if the stream is not a terminal.
        """
        self._label, self._total, self._unit = label, total, unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else every
        self._start = self._shown = time.monotonic()
        self._begun = self._done = done
        self._detail = self._text = ""
        self._fresh = True  # whether the state has changed since it was last shown
        # Recent (time, work done) pairs, from which the rate is estimated.
        self._marks = collections.deque([] if warm_up else [(self._start, done)])

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_):
        self.close(show=kind is None)

    @property
    def seconds(self) -> float:
        """Seconds since the job started."""
        return max(time.monotonic() - self._start, 1e-6)

    def update(self, count: int = 1, detail: str = "") -> None:
        """Adds to the work done, and shows the line if it is due.

        Args:
          count: work done since the last update.
          detail: text to add to the line.
        """
        now, due = time.monotonic(), False
        self._done, self._detail = self._done + count, detail
        if count:
            due, self._fresh = not self._marks or self._done >= self._total, True
            self._marks.append((now, self._done))
        while len(self._marks) > 2 and self._marks[1][0] < now - _RATE_OVER:
            self._marks.popleft()
        if due or now - self._shown >= self._every:
            self._show()

    def note(self, text: str) -> None:
        """Prints a permanent line; on a terminal it appears above the progress line."""
        if not self._terminal:
            return self._write(f"{text}\n")
        again = self._in_place(self._text) if self._text else ""
        self._write(f"\r{text}\x1b[K\n{again}")

    def close(self, *, show: bool = True) -> None:
        """Ends the progress line.

        Args:
          show: whether to show the final state first.
        """
        if show and self._fresh:
            self._show()
        if self._terminal:
            self._write("\n")
            self._text = ""

    def line(self) -> str:
        """Returns the progress line for the current state."""
        part = self._done / self._total if self._total else 1.0
        head, facts = f"{self._label} {part:4.0%}", ", ".join(self._facts())
        if not self._terminal:
            return f"{head} {facts}"
        room = (self._columns() or 1000) - len(f"{head} [] {facts}") - 1
        width = min(_BAR, room)
        filled = int(width * min(part, 1.0))
        bar = f" [{'#' * filled}{'.' * (width - filled)}]" if 3 * width >= _BAR else ""
        return f"{head}{bar} {facts}"

    def _facts(self) -> Iterator[str]:
        """Parts of the line after the bar."""
        ended = self._done >= self._total
        rate = (self._done - self._begun) / self.seconds if ended else self._rate()
        if self._unit == "bytes":
            yield f"{human_bytes(self._done)} of {human_bytes(self._total)}"
            yield f"{human_bytes(rate)}/s"
        else:
            yield f"{self._done} of {self._total} {self._unit}"
        if self._detail:
            yield self._detail
        if ended:
            yield human_time(self.seconds)
        else:
            yield f"{human_time((self._total - self._done) / rate) if rate else '?'} left"

    def _rate(self) -> float:
        """Recent work per second; 0 if unknown."""
        if len(self._marks) < 2:
            return 0.0
        (begin, low), (end, high) = self._marks[0], self._marks[-1]
        return (high - low) / max(end - begin, 1e-6)

    def _show(self) -> None:
        """Writes the current line."""
        self._text, self._shown, self._fresh = self.line(), time.monotonic(), False
        self._write(self._in_place(self._text) if self._terminal else f"{self._text}\n")

    def _in_place(self, text: str) -> str:
        """Escape codes that replace the line; cut to the width, for a wrapped line would stay."""
        columns = self._columns()
        return f"\r{text[: columns - 1] if columns > 1 else text}\x1b[K"

    def _columns(self) -> int:
        """Width of the terminal in characters; 0 if the stream has no real terminal."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            return 0

    def _write(self, text: str) -> None:
        """Writes to the stream; the job goes on if its terminal or its reader has gone."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()
