"""`metrics.jsonl`, what a training run writes of itself: reading it, cutting it on resuming."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vl2jax.common.errors import UserError

METRICS_FILE = "metrics.jsonl"

Metrics = dict[str, Any]  # `step`, and by name a float, a list of floats or None


def read_metrics(path: Path | str) -> list[Metrics]:
    """Reads a whole metrics file, see `iterate_metrics`."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path | str) -> Iterator[Metrics]:
    """Reads what a run wrote of itself, line by line.

    Args:
      path: a metrics.jsonl; a last line that a killed run left torn is passed over.

    Yields:
      A dict per line: `step`, and by name a value, or a list with one per layer; None stands for
      what was not finite.

    Raises:
      UserError: another line is broken.
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if (line := parse_line(text)) is not None:
                yield line
            elif text.endswith(b"\n"):
                raise UserError(
                    f"{path}:{number} is no line of metrics, a JSON object with a step; remove it"
                )


def parse_line(text: str | bytes) -> Metrics | None:
    """Reads one line of a metrics file; None where it is torn or no such line."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def drop_after(path: Path, step: int) -> int:
    """Drops from a metrics file what a run wrote after a step, at once or not at all.

    Lines that cannot be read go too: a killed run may leave one.

    Args:
      path: a metrics.jsonl, or nothing yet.
      step: the last to keep; 0 for a run that begins, which keeps none.

    Returns:
      How many lines were dropped.

    Raises:
      OSError: the file cannot be rewritten; it stays as it was.
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
