"""Tests of progress lines: amount, rate, time left, and the width of the terminal."""

import io
import os

import pytest

from vl2jax.common.progress import Progress, human_bytes, human_count, human_time


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (6_741_002_880, "6.74 GB"), (54_960_268_496, "55 GB"),
     (1.2e12, "1.2 TB"), (1500, "1.5 kB")],
)  # fmt: skip
def test_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (187.4, "3:07"), (3750, "1:02:30")])
def test_time(seconds, text):
    assert human_time(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_plain_lines_at_intervals(clock):
    stream = io.StringIO()
    with Progress("converting", 1000, stream=stream, every=10) as progress:
        clock[0] += 5
        progress.update(100)
        clock[0] += 5
        progress.update(100)
        clock[0] += 40
        progress.update(800)
    assert stream.getvalue().splitlines() == [
        "converting  20% 200 B of 1 kB, 20 B/s, 0:40 left",
        "converting 100% 1 kB of 1 kB, 20 B/s, 0:50",
    ]


def test_counts_of_things(clock):
    """Work done before the job counts as done but not in the rate; `detail` is shown."""
    stream = io.StringIO()
    with Progress("answering", 10, "rows", done=4, stream=stream, every=10) as progress:
        progress.update(0, "0 tokens/s")
        clock[0] += 10
        progress.update(0, "5 tokens/s")
        clock[0] += 10
        progress.update(2, "7 tokens/s")
        clock[0] += 5
        progress.update(4, "8 tokens/s")
        progress.update(0, "9 tokens/s")
        assert progress.seconds == 25
    assert stream.getvalue().splitlines() == [
        "answering  40% 4 of 10 rows, 5 tokens/s, ? left",
        "answering  60% 6 of 10 rows, 7 tokens/s, 0:40 left",
        "answering 100% 10 of 10 rows, 8 tokens/s, 0:25",
    ]


def test_time_left_by_the_rate_of_late(clock):
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress("x", 1000, "y", stream=stream) as progress:
        for count, seconds in ((100, 1), (1, 100), (1, 100), (1, 100)):
            clock[0] += seconds
            progress.update(count)
        raise KeyboardInterrupt
    assert stream.getvalue().splitlines()[-1] == "x  10% 103 of 1000 y, 24:55:00 left"


def test_a_slow_first_update_is_shown_and_not_counted(clock):
    stream = io.StringIO()
    with Progress("x", 4, "y", warm_up=True, stream=stream, every=10) as progress:
        clock[0] += 5
        progress.update()
        clock[0] += 1
        progress.update()
        clock[0] += 9
        progress.update()
        progress.close()
    assert stream.getvalue().splitlines() == [
        "x  25% 1 of 4 y, ? left",
        "x  75% 3 of 4 y, 0:05 left",
    ]


def test_nothing_to_do(clock):
    stream = io.StringIO()
    with Progress("loading", 0, stream=stream):
        pass
    assert stream.getvalue() == "loading 100% 0 B of 0 B, 0 B/s, 0:00\n"


def test_bar_on_a_terminal(clock):
    stream = Terminal()
    with Progress("loading", 400, stream=stream) as progress:
        clock[0] += 1
        progress.update(100)
        clock[0] += 0.01
        progress.update(100)  # too soon to be shown
        clock[0] += 1
        progress.update(200)
    first, second, *_ = stream.getvalue().split("\r")[1:]
    assert (
        first == "loading  25% [######..................] 100 B of 400 B, 100 B/s, 0:03 left\x1b[K"
    )
    assert second.startswith("loading 100% [########################] 400 B of 400 B")
    assert stream.getvalue().endswith("\n")


def test_failure_shows_no_success(clock):
    stream = io.StringIO()
    with pytest.raises(OSError, match="full"), Progress("converting", 10, stream=stream):
        raise OSError("full")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (3.2e6, "3.2M")],
)
def test_counts(count, text):
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (80, "loading  50% [############............] 50 of 100 parts, 0:01 left"),
        (60, "loading  50% [########.........] 50 of 100 parts, 0:01 left"),
        (50, "loading  50% 50 of 100 parts, 0:01 left"),
        (11, "loading  5"),
    ],
)
def test_a_line_never_wraps(monkeypatch, clock, columns, line):
    stream = Terminal()
    stream.fileno = lambda: 7
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((columns, 5)))
    with Progress("loading", 100, "parts", stream=stream) as progress:
        clock[0] += 1
        progress.update(50)
        progress.note("a note may be as long as it likes")
        progress.close()
    shown, note, again = stream.getvalue().split("\x1b[K")[:3]
    assert shown == f"\r{line}" and len(line) < columns
    assert note == "\ra note may be as long as it likes" and again == f"\n{shown}"
