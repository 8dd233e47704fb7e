"""What the processes of a run tell each other through JAX's coordination service.

The service runs in process 0.  It has a key-value store, barriers and heartbeats, and one
connection to each process; no other connection is made.  `processes.py` is the door to it.

How a process that ends is noticed:
- It ends with an error: it puts a report into the store, which a thread of each process waits for.
- A collective fails, because a process was killed, or because of an error in the program: the roll
  is called, which the threads answer, and the processes that do not were killed.
- It is killed in any other moment, or its host is lost: it misses heartbeats, and JAX ends the
  other processes.
"""

import contextlib
import resource
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from vl2jax.common.errors import UserError

_FOREVER = 30 * 24 * 3600 * 1000  # milliseconds
_CHUNK = 2**18  # maximum number of characters per value in the store
_ROLL_CALL = 5  # seconds in which processes must answer
_OTHER_FILES = 256  # that process 0 has open, beside a connection of each process
_DELIVERY = 1  # seconds in which the service, which ends with process 0, sends its last answers
# Keys in the store.
_MESSAGES, _REPORT, _ROLL, _MISSING = (
    f"vl2jax/{name}" for name in ("told", "report", "roll", "missing")
)
_REGULAR, _ERROR, _UNCLEAR = "regular", "error", "unclear"  # kinds of reports


class Coordination:
    """Messages, barriers and reports of one process.

    Attributes:
      index: number of this process.
      count: number of processes.
    """

    def __init__(self, client: Any, index: int, count: int):
        """
        Args:
          client: JAX's client of the service (`DistributedRuntimeClient`).
          index: number of this process.
          count: number of processes.
        """
        self.index, self.count = index, count
        self._client, self._thread = client, threading.Thread()

    def broadcast(self, name: str, text: str) -> str:
        """Returns the text of process 0, on all processes; each call needs a new name."""
        if self.index == 0:
            self._put(f"{_MESSAGES}/{name}", text)
            return text
        return self._take(f"{_MESSAGES}/{name}")

    def gather(self, name: str, text: str) -> list[str]:
        """Returns the texts of all processes on process 0, [] on the others."""
        if self.index:
            self._put(f"{_MESSAGES}/{name}/{self.index}", text)
            return []
        return [text, *(self._take(f"{_MESSAGES}/{name}/{i}") for i in range(1, self.count))]

    def wait(self, name: str, seconds: float) -> bool:
        """Returns whether all processes have called it in time; each call needs a new name."""
        try:
            self._client.wait_at_barrier(f"vl2jax/{name}", round(seconds * 1000))
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def watch(self, on_lost: Callable[[Sequence[int]], None]) -> None:
        """Starts the thread that waits for reports.

        Args:
          on_lost: called in that thread, once, with the numbers of the processes that have ended.
        """
        self._thread = threading.Thread(target=self._watch, args=(on_lost,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for all processes, then ends the thread that `watch` has started."""
        self._client.wait_at_barrier("vl2jax/end", _FOREVER)
        if self.index == 0:
            self._report(_REGULAR)
        self._thread.join()

    def report_error(self) -> None:
        """Tells all others that this process ends with an error."""
        self._report(_ERROR)
        if self.index == 0:
            self._thread.join(2 * _DELIVERY)

    def call_the_roll(self) -> None:
        """Tells all others that this process ends, maybe because one was killed.

        Calls `on_lost` if one was; otherwise the others report this process.
        """
        self._report(_UNCLEAR)
        self._thread.join(3 * _ROLL_CALL)

    def _report(self, kind: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is one, or no service anymore
            self._client.key_value_set(_REPORT, f"{kind} {self.index}")

    def _watch(self, on_lost: Callable[[Sequence[int]], None]) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended
            kind, _, number = self._get(_REPORT).partition(" ")
            if kind == _REGULAR:
                return
            lost = [int(number)] if kind == _ERROR else self._missing() or [int(number)]
            if self.index == 0:
                time.sleep(_DELIVERY)
            if self.index not in lost:
                on_lost(lost)

    def _missing(self) -> list[int]:
        """Answers the roll call; returns the numbers of the processes that do not."""
        self._client.key_value_set(f"{_ROLL}/{self.index}", "")
        if self.index == 0:
            time.sleep(_ROLL_CALL)
            answers = self._client.key_value_dir_get(f"{_ROLL}/")
            present = {int(key.rpartition("/")[2]) for key, _ in answers}
            missing = sorted(set(range(self.count)) - present)
            self._client.key_value_set(_MISSING, " ".join(map(str, missing)))
        return list(map(int, self._get(_MISSING).split()))

    def _put(self, key: str, text: str) -> None:
        pieces = [text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK)]
        for number, piece in enumerate(pieces):
            self._client.key_value_set(f"{key}/piece{number}", piece)
        self._client.key_value_set(key, str(len(pieces)))

    def _take(self, key: str) -> str:
        return "".join(self._get(f"{key}/piece{i}") for i in range(int(self._get(key))))

    def _get(self, key: str) -> str:
        return self._client.blocking_key_value_get(key, _FOREVER)


def allow_connections(count: int) -> None:
    """Raises the limit of open files of process 0, which has a connection to each process.

    Args:
      count: number of processes; -1: not known.

    Raises:
      UserError: the system does not allow it.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in limits)
    needed = max(count, 0) + _OTHER_FILES
    if needed > hard:
        raise UserError(
            f"process 0 of {count} needs {needed} open files, but may have {hard}; start it where"
            f" `ulimit -Hn` is {needed} or more"
        )
    if soft < (wanted := needed if count >= 0 else min(hard, 2**16)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
