"""Progress lines: bytes, rate and time left."""

import io
import os

import pytest

from vl2jax.common.progress import Progress, StatusLine, human_bytes, human_count, human_time


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
    """A clock that tests set."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_plain_lines_at_intervals(clock):
    stream = io.StringIO()
    with Progress("converting", 1000, stream, every=10) as progress:
        clock[0] += 5
        progress.update(100)
        clock[0] += 5
        progress.update(100)
        clock[0] += 40
        progress.update(800)
    assert stream.getvalue().splitlines() == [
        "converting  20% 200 B of 1 kB, 20 B/s, 0:40 left",
        "converting 100% 1 kB of 1 kB, 20 B/s, 0:50",
        "converting 100% 1 kB of 1 kB, 20 B/s, 0:50",
    ]


def test_bar_on_a_terminal(clock):
    stream = Terminal()
    with Progress("loading", 400, stream) as progress:
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
    with pytest.raises(OSError, match="full"), Progress("converting", 10, stream):
        raise OSError("full")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (3.2e6, "3.2M")],
)
def test_counts(count, text):
    assert human_count(count) == text


def test_a_line_never_wraps(monkeypatch):
    stream = Terminal()
    stream.fileno = lambda: 7
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((11, 5)))
    status = StatusLine(stream)
    status.show("a line of many words", 0.0)
    status.note("a note may be as long as it likes")
    status.end()
    assert stream.getvalue() == (
        "\ra line of \x1b[K\ra note may be as long as it likes\x1b[K\n\ra line of \x1b[K\n"
    )
