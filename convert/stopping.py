"""Work that a signal ends between two pieces, and never in the middle of one."""

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
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # those that the system has
_PATIENCE = 60.0  # seconds for the pieces under way


class Stop:
    """Whether to stop, as work asks between two pieces."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the first that came

    def check(self) -> None:
        """Raises `Stopped` once a signal has come."""
        if self.signal is not None:
            raise Stopped

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, until a signal comes."""
        for item in items:
            self.check()
            yield item


class Stopped(Exception):
    """Unwinds the work; whoever began it raises `Interrupted`."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended the work.  Its notes say what is left behind; without any, nothing is.

    Attributes:
      exit_code: of a program that ends for this: 128 and the number of the signal.
      still_running: the work has not ended in the time that it was given.
    """

    def __init__(self, number: int, still_running: bool = False):
        super().__init__()
        self.exit_code, self.still_running = 128 + number, still_running


def run_stoppable(work: Callable[[Stop], T], writes_to: Path) -> T:
    """Runs `work(stop)`, which a signal (Ctrl-C, SIGTERM, SIGHUP) ends where it asks `stop`.

    The work has a thread of its own, so its clean-up and that of the libraries below it run to
    their end, however often the signal comes.  Signals that are ignored, or that have a handler of
    someone else, stay as they are.  Outside the main thread, where no signal arrives, `work` just
    runs.

    Args:
      work: cleans up after itself when `stop` raises.
      writes_to: named in the note on work that does not end.

    Returns:
      What `work` returns, also where the signal came too late to stop it.

    Raises:
      Interrupted: the work was stopped, or had not ended a minute after the signal.
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
    """Lets signals that would end the process tell `stop` instead."""

    def tell(number: int, _: Any) -> None:
        if stop.signal is None:
            stop.signal = number

    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [number for number in numbers if before[number] in usual]
    try:
        for number in ours:
            signal.signal(number, tell)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _wait(outcome: concurrent.futures.Future, stop: Stop) -> None:
    """Until the end of the work; after a signal not for ever."""
    deadline = math.inf
    while not outcome.done() and time.monotonic() < deadline:
        concurrent.futures.wait([outcome], timeout=0.2)  # signals arrive in between
        if stop.signal is not None and deadline == math.inf:
            deadline = time.monotonic() + _PATIENCE


def _was_stopped(error: BaseException | None) -> bool:
    """Whether an error is `Stopped`, or came of it."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__cause__ or error.__context__
    return error is not None
