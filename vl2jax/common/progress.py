"""Progress of a long job: a bar on a terminal, plain lines now and then elsewhere."""

import collections
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

_BAR = 24  # characters, where the terminal has room
_RATE_OVER = 60.0  # seconds that the rate is taken over


def human_bytes(count: float) -> str:
    """Writes a number of bytes as people read it: `6.74 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_count(count: float, digits: int = 3) -> str:
    """Writes a number in a few digits: `850`, `12.3k`, `1.2M`."""
    for unit in ("", "k", "M"):
        if abs(count) < 999.5:
            return f"{count:.{digits}g}{unit}"
        count /= 1000
    return f"{count:.{digits}g}G"


def human_time(seconds: float) -> str:
    """Writes a duration: `3:07`, `1:02:30`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """How far a job is, how fast, and how long it will take.

    On a terminal one line with a bar, rewritten in place; elsewhere a plain line now and then.  Use
    it as a context manager: the last state is shown and stays, unless an error ends the job.
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
        """
        Args:
          label: what is being done.
          total: how much there is to do, with what is done already.
          unit: what is counted; of bytes the rate is shown too.
          done: what was done before.
          warm_up: the first update is slower than the others, since it compiles: it is shown at
            once, and the time left is reckoned from there on.
          stream: where to write; standard error by default.
          every: seconds between lines where the stream is not a terminal.
        """
        self._label, self._total, self._unit = label, total, unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else every
        self._start = self._shown = time.monotonic()
        self._begun = self._done = done
        self._detail = self._text = ""
        self._fresh = True  # there is more to say than was shown
        # When how much was done, of late: what the time left is reckoned from.
        self._marks = collections.deque([] if warm_up else [(self._start, done)])

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_):
        self.close(show=kind is None)

    @property
    def seconds(self) -> float:
        """Since the job began."""
        return max(time.monotonic() - self._start, 1e-6)

    def update(self, count: int = 1, detail: str = "") -> None:
        """Counts what has been done since the last update, and shows the line when it is time.

        Args:
          detail: what else the line is to say.
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
        """Prints a line that stays; on a terminal it comes above the one that changes."""
        if not self._terminal:
            return self._write(f"{text}\n")
        again = self._in_place(self._text) if self._text else ""
        self._write(f"\r{text}\x1b[K\n{again}")

    def close(self, *, show: bool = True) -> None:
        """Leaves the line on the screen, with the last state if it is to be shown."""
        if show and self._fresh:
            self._show()
        if self._terminal:
            self._write("\n")
            self._text = ""

    def line(self) -> str:
        """The line as it is now."""
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
        """What the line says behind its bar."""
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
        """How much is done in a second, of late; 0 where nothing is known."""
        if len(self._marks) < 2:
            return 0.0
        (begin, low), (end, high) = self._marks[0], self._marks[-1]
        return (high - low) / max(end - begin, 1e-6)

    def _show(self) -> None:
        """Shows the line, and remembers when."""
        self._text, self._shown, self._fresh = self.line(), time.monotonic(), False
        self._write(self._in_place(self._text) if self._terminal else f"{self._text}\n")

    def _in_place(self, text: str) -> str:
        """The codes that put a line in the place of the last; one that wrapped would stay."""
        columns = self._columns()
        return f"\r{text[: columns - 1] if columns > 1 else text}\x1b[K"

    def _columns(self) -> int:
        """Of the terminal; 0 where there is no real one behind the stream."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns
        except OSError:
            return 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
