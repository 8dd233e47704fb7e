"""Reads `metrics.jsonl`, and truncates it when a run resumes."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vl2jax.common.errors import UserError

METRICS_FILE = "metrics.jsonl"

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


def drop_after(path: Path, step: int) -> int:
    """Removes the metrics after a step from a metrics file, atomically.

    Malformed lines are also removed, because a killed run can leave one.

    Args:
      path: a metrics.jsonl; it need not exist.
      step: last step to keep; 0: keep none.

    Returns:
      Number of lines removed.

    Raises:
      OSError: the file cannot be rewritten; it is unchanged.
    """
    if not path.exists():
        return 0
    dropped, torn = 0, False
    beside = path.with_name(path.name + ".new")
    with open(path, "rb") as old, open(beside, "wb") as new:
        for text in old:
            line = parse_line(text)
            if step > 0 and line is not None and line["step"] <= step:
                new.write(text.rstrip(b"\n") + b"\n")
                torn |= not text.endswith(b"\n")
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if dropped or torn:
        os.replace(beside, path)
    else:
        beside.unlink()
    return dropped
