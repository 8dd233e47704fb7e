"""Fuzzing: a target is called with many inputs, and may raise nothing but a short `UserError`.

`VL2JAX_FUZZ_SECONDS` is the time of each target (half a second by default), `VL2JAX_FUZZ_SEED` the
first seed (0).
"""

import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st

from vl2jax.common.errors import UserError

SECONDS = float(os.environ.get("VL2JAX_FUZZ_SECONDS", "0.5"))
SEED = int(os.environ.get("VL2JAX_FUZZ_SEED", "0"))
LONGEST = 30  # seconds for one input; more is a hang
MEMORY = 2 << 30  # bytes above those of the process before
MESSAGE = 1200  # characters of a message


def fuzz(
    strategy: st.SearchStrategy, target: Callable[[Any], Any], seconds: float = SECONDS
) -> int:
    """Calls a target with inputs of a strategy; returns how many there were.

    Args:
      strategy: the inputs.
      target: called with each input; it may raise UserError.
      seconds: when to stop.
    """
    end, count = time.monotonic() + seconds, 0
    _forget_peak()
    before = _memory("VmRSS")

    def run(value: Any) -> None:
        nonlocal count
        if count and time.monotonic() > end:
            return
        count += 1
        _check(target, value)
        assert _memory("VmHWM") - before < MEMORY, "too much memory"

    options = hypothesis.settings(
        max_examples=100,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    for seed in itertools.count(SEED):
        hypothesis.seed(seed)(options(hypothesis.given(strategy)(run)))()
        if time.monotonic() > end:
            return count


def mutated(seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Files that differ from whole ones in a few places."""
    return st.builds(_mutate, st.sampled_from(seeds), st.lists(_edits(seeds), max_size=6))


def _edits(seeds: Sequence[bytes]) -> st.SearchStrategy:
    place, some = st.floats(0, 1), st.binary(max_size=9)
    numbers = st.sampled_from([0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1])
    return st.one_of(
        st.tuples(st.just("set"), place, some),
        st.tuples(st.just("xor"), place, st.integers(1, 255)),
        st.tuples(st.just("number"), place, st.tuples(numbers, st.sampled_from(["big", "little"]))),
        st.tuples(st.just("insert"), place, some),
        st.tuples(st.just("drop"), place, place),
        st.tuples(st.just("cut"), place, st.none()),
        st.tuples(st.just("repeat"), place, st.integers(1, 300)),
        st.tuples(st.just("splice"), place, st.sampled_from(seeds)),
    )


def _mutate(seed: bytes, edits: Sequence[tuple[str, float, Any]]) -> bytes:
    content = bytearray(seed)
    for kind, share, value in edits:
        place = min(int(share * len(content)), max(len(content) - 1, 0))
        if kind == "set":
            content[place : place + len(value)] = value
        elif kind == "xor" and content:
            content[place] ^= value
        elif kind == "number":
            content[place : place + 4] = value[0].to_bytes(4, value[1])
        elif kind == "insert":
            content[place:place] = value
        elif kind == "drop":
            del content[place : place + int(value * 64)]
        elif kind == "cut":
            del content[place:]
        elif kind == "repeat":
            content[place:place] = content[place : place + value]
        elif kind == "splice":
            content[place:] = value[min(place, len(value)) :]
    return bytes(content)


def _check(target: Callable[[Any], Any], value: Any) -> None:
    """Calls a target once, with a limit of time."""

    def hang(*_: Any) -> None:
        raise AssertionError(f"it takes more than {LONGEST} seconds")

    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    old = signal.signal(signal.SIGALRM, hang) if timed else None
    if timed:
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        target(value)
    except UserError as error:
        text = str(error)
        assert text and len(text) <= MESSAGE, f"a message of {len(text)} characters"
        assert len(text.splitlines()) == 1, "a message of several lines"
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)


def _forget_peak() -> None:
    """Makes the peak of memory that of now, where Linux offers it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _memory(name: str) -> int:
    """`VmRSS`, the bytes of this process, or `VmHWM`, their peak."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
