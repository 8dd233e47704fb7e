"""Reads `metrics.jsonl`, and truncates it when a run resumes."""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vl2jax.common.errors import UserError

METRICS_FILE = "metrics.jsonl"
_TAIL = 2**18  # bytes that are read in one piece, more than a line has
_READ_WHOLE = 16 * 2**20  # bytes up to which all lines are parsed
_MARKED = 2000  # maximum number of lines with one mark

Metrics = dict[str, Any]  # `step` (int), and metrics by name: a float, a list of floats, or None


def read_metrics(path: Path | str) -> list[Metrics]:
    """Reads all lines of a metrics file, see `iterate_metrics`."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path | str) -> Iterator[Metrics]:
    """Reads a metrics file line by line.

    Args:
      path: a metrics.jsonl.  An incomplete last line, which a killed run can leave, is ignored.

    Yields:
      A dict per line: `step`, and the metrics by name, each a value or a list with one value per
      layer.  None is a value that was not finite.

    Raises:
      UserError: another line is malformed.
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if (line := parse_line(text)) is not None:
                yield line
            elif text.endswith(b"\n"):
                raise UserError(
                    f"{path}:{number} is not a JSON object with a step; remove this line"
                )


def parse_line(text: str | bytes) -> Metrics | None:
    """Parses one line of a metrics file; returns None if it is incomplete or malformed."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def drop_after(path: Path, step: int) -> int | None:
    """Removes the metrics after a step from a metrics file, and an incomplete last line.

    The steps of the lines ascend, so the place is found by bisection, without reading the file.

    Args:
      path: a metrics.jsonl; it need not exist.
      step: last step to keep; 0: keep none.

    Returns:
      The last step that was removed; None if no step was.

    Raises:
      OSError: the file cannot be written; it is unchanged.
    """
    if not path.exists():
        return None
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = _end_of_step(file, step, size) if step > 0 else 0
        removed = None
        file.seek(max(end, size - _TAIL))
        for line in map(parse_line, file):
            if line is not None:
                removed = line["step"]
        file.truncate(end)
        file.seek(max(end - 1, 0))
        if file.read(1) not in (b"", b"\n"):
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    return removed


def _end_of_step(file: BinaryIO, step: int, size: int) -> int:
    """Where the last line of a step, or of an earlier one, ends in a file of `size` bytes."""
    low, high = 0, size  # the place is not before `low`, where a line begins
    while high - low > _TAIL:
        middle = (low + high) // 2
        file.seek(middle)
        file.readline()  # the rest of a line
        line = None
        while line is None and file.tell() < high:
            line = parse_line(file.readline())  # a malformed one has no step
        if line is not None and line["step"] <= step:
            low = file.tell()
        else:
            high = middle
    file.seek(low)
    while text := file.readline():
        line = parse_line(text)
        if line is not None and line["step"] > step:
            break
        low = low if line is None else file.tell()
    return low


def sample_metrics(path: Path | str, marks: Sequence[bytes]) -> Iterator[Metrics]:
    """Reads a metrics file, or evenly spaced lines of it if it is long.

    Args:
      path: a metrics.jsonl.
      marks: texts of lines that are rare and read in any case, up to a number of them.

    Yields:
      The lines in their order, see `iterate_metrics`.  Malformed lines are passed over.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _READ_WHOLE:
            yield from filter(None, map(parse_line, file))
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            length = len(file.read(_TAIL)) / max(data[:_TAIL].count(b"\n"), 1)  # of a line
            count = max(int(_READ_WHOLE / length), 2)
            places = {data.rfind(b"\n", 0, i * size // count) + 1 for i in range(1, count)}
            places |= {0, data.rfind(b"\n", 0, size - 1) + 1}
            for mark in marks:
                places |= set(_marked(data, mark))
            for place in sorted(places):
                file.seek(place)
                if (line := parse_line(file.readline())) is not None:
                    yield line


def _marked(data: mmap.mmap, mark: bytes) -> list[int]:
    """Where the lines with a mark begin; evenly spaced ones if there are many."""
    found, place = [], data.find(mark)
    while place >= 0:
        found.append(data.rfind(b"\n", 0, place) + 1)
        end = data.find(b"\n", place)
        place = data.find(mark, end) if end >= 0 else -1
    return found[:: len(found) // _MARKED + 1] + found[-1:]
