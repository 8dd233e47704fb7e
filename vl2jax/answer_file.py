"""Answers to a file of requests: JSON lines in, JSON lines out, in the same order."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from vl2jax.answer_output import json_line, record
from vl2jax.collate import Sample
from vl2jax.errors import UserError
from vl2jax.request import parse_request
from vl2jax.session import Session


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the input.

    Attributes:
      names: what leads its output: `row`, the number of its line, and `id` if it has one.
      sample: what to answer; None for a bad row.
      error: what is wrong with a bad row.
    """

    names: dict[str, Any]
    sample: Sample | None
    error: str | None = None


def answer_file(session: Session, source: Path, target: Path, batch_size: int) -> int:
    """Answers each line of `source`, a request as `request.parse_request` reads it.

    Each answer is in `target` as soon as it and all before it are done; a bad row has an `error`
    there.

    Args:
      batch_size: rows that are answered together.

    Returns:
      The number of bad rows.
    """
    bad = done = 0
    # Half a surrogate pair in an id is written as the escape that it was read as.
    written = target.open("w", encoding="utf-8", errors="backslashreplace")
    with source.open("rb") as lines, written as out:
        for group in _groups(_rows(session, lines, source.parent), batch_size):
            _answer_group(session, group, out)
            done += len(group)
            bad += sum(row.sample is None for row in group)
            print(f"{target}: {done} rows, {bad} of them with an error", file=sys.stderr)
    if not done:
        raise UserError(f"{source}: no rows; expected one JSON object per line")
    return bad


def _rows(session: Session, lines: Iterable[bytes], folder: Path) -> Iterator[Row]:
    token = session.processor.tokenizer.image_token
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        names: dict[str, Any] = {"row": number}
        try:
            request = parse_request(line, folder, image_token=token)
            if request.id is not None:
                names["id"] = request.id
            yield Row(names, session.prepare(request))
        except (UserError, OSError) as error:
            yield Row(names, None, str(error))


def _groups(rows: Iterator[Row], batch_size: int) -> Iterator[list[Row]]:
    """Consecutive rows with `batch_size` good ones among them, fewer in the last group."""
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if sum(row.sample is not None for row in group) == batch_size:
            yield group
            group = []
    if group:
        yield group


def _answer_group(session: Session, group: list[Row], out: TextIO) -> None:
    """Answers the good rows together and writes each line once its turn has come."""
    samples = [row.sample for row in group if row.sample is not None]
    waiting, good = iter(group), 0
    row = next(waiting)
    for answers, _ in session.stream(samples) if samples else [([], [])]:
        while row is not None and (row.sample is None or answers[good].done):
            if row.sample is None:
                written = {"error": {"message": row.error}}
            else:
                written = record(answers[good].result(), row.sample)
                good += 1
            out.write(json_line(row.names | written) + "\n")
            out.flush()
            row = next(waiting, None)
