"""Runs work that a signal stops between two pieces, never within one."""

import concurrent.futures
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # not all systems have all of them
_PATIENCE = 60.0  # seconds that the current pieces may take after a signal


class Stop:
    """A flag that tells the work to stop; the work checks it between two pieces.

    Attributes:
      signal: number of the first signal; None if there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def check(self) -> None:
        """Raises `Stopped` if a signal has arrived."""
        if self.signal is not None:
            raise Stopped

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; raises `Stopped` before the next item after a signal."""
        for item in items:
            self.check()
            yield item


class Stopped(Exception):
    """Unwinds the work; `run_stoppable` then raises `Interrupted`."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the work.  Its notes say what is left on disk; no notes: nothing.

    Attributes:
      exit_code: exit code for the program, 128 + number of the signal.
      still_running: whether the work has not ended within the time limit.
    """

    def __init__(self, number: int, still_running: bool = False):
        """Makes the exception for signal `number`."""
        super().__init__()
        self.exit_code, self.still_running = 128 + number, still_running


def run_stoppable(work: Callable[[Stop], T], writes_to: Path) -> T:
    """Runs `work(stop)`; a signal (Ctrl-C, SIGTERM, SIGHUP) makes the next check of `stop` raise.

    The work runs in its own thread, so that further signals do not interrupt its clean-up or that
    of libraries.  Signals that are ignored or have another handler are not changed.  If this is not
    the main thread, which alone receives signals, `work` is simply called.

    Args:
      work: cleans up when `stop` raises.
      writes_to: the output, which is named if the work does not end.

    Returns:
      The result of `work`, also if a signal came too late to stop it.

    Raises:
      Interrupted: the work was stopped, or has not ended a minute after the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        return work(Stop())
    stop, outcome = Stop(), concurrent.futures.Future[T]()

    def run() -> None:
        try:
            outcome.set_result(work(stop))
        except BaseException as error:
            outcome.set_exception(error)

    with _signals_to(stop):
        threading.Thread(target=run, daemon=True).start()
        _wait(outcome, stop)
    if stop.signal is not None and not outcome.done():
        interrupted = Interrupted(stop.signal, still_running=True)
        interrupted.add_note(f"writing to {writes_to} has not ended after {_PATIENCE:.0f} seconds")
        raise interrupted
    error = outcome.exception()
    if stop.signal is not None and _was_stopped(error):
        interrupted = Interrupted(stop.signal)
        for note in getattr(error, "__notes__", ()):
            interrupted.add_note(note)
        raise interrupted from None
    return outcome.result()


@contextlib.contextmanager
def _signals_to(stop: Stop) -> Iterator[None]:
    """Installs handlers that set `stop` instead of ending the process."""

    def set_stop(number: int, _: Any) -> None:
        if stop.signal is None:
            stop.signal = number

    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if before[number] in usual]
    try:
        for number in ours:
            signal.signal(number, set_stop)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _wait(outcome: concurrent.futures.Future, stop: Stop) -> None:
    """Waits for the end of the work; after a signal, for at most `_PATIENCE` seconds."""
    deadline = math.inf
    while not outcome.done() and time.monotonic() < deadline:
        concurrent.futures.wait([outcome], timeout=0.2)  # signals are handled in between
        if stop.signal is not None and deadline == math.inf:
            deadline = time.monotonic() + _PATIENCE


def _was_stopped(error: BaseException | None) -> bool:
    """Whether an error is `Stopped` or was caused by it."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error is not None
