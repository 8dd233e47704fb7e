"""Answers to a file of requests: JSON lines, or a JSON list, in; JSON lines out, in the same order.

A run that ended early, however, goes on where it stopped when it is started again.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vl2jax.answer_output import json_line, record
from vl2jax.collate import Sample
from vl2jax.engine import Engine
from vl2jax.errors import UserError
from vl2jax.lock import lock_directory
from vl2jax.progress import StatusLine, bar, human_count, human_time
from vl2jax.request import CONVERSATION_KEYS, parse_question
from vl2jax.row import RowAnswer
from vl2jax.session import Session


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the input, taken in.

    Attributes:
      names: what leads its output: `row`, the number of its line, `key`, by which a later run knows
        line and flags again, and `id` if it has one.
      sample: what to answer; None for a bad row.
      answer: of a good row.
      error: what is wrong with a bad row.
    """

    names: dict[str, Any]
    sample: Sample | None = None
    answer: RowAnswer | None = None
    error: str | None = None

    @property
    def done(self) -> bool:
        return self.answer is None or self.answer.done

    @property
    def line(self) -> str:
        if self.answer is None:
            return json_line(self.names | {"error": {"message": self.error}})
        return json_line(self.names | record(self.answer.result(), self.sample))


def answer_file(
    session: Session, source: Path, target: Path, batch_size: int, part: tuple[int, int] = (0, 1)
) -> int:
    """Answers each line of `source`, or each element of the list that it is, as
    `request.parse_question` reads it.

    Each answer is in `target` as soon as it and all before it are done; a bad row has an `error`
    there.  Rows that `target` answers already are left as they are.

    Args:
      batch_size: rows that are answered together.
      part: index and count of processes; each answers every count-th row, into a file of its own
        (`part_of`).

    Returns:
      The number of bad rows.

    Raises:
      UserError: no rows, or a `target` that answers other rows or was made with other flags.
    """
    target = part_of(target, part)
    settings = json.dumps(session.settings, sort_keys=True).encode()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(target.open("a+b"))
        try:
            lock_directory(target, stack)
        except BlockingIOError as error:
            raise UserError(f"{target}: another process is writing it") from error
        total, done, bad = _resume(source, out, target, settings, part)
        if done:
            print(f"{target}: {done} of {total} rows are answered already", file=sys.stderr)
        run = _Run(session, source, settings, part)
        bad += run.write(out, batch_size, done, total)
    print(f"{target}: {total} rows, {bad} of them with an error", file=sys.stderr)
    return bad


def part_of(target: Path, part: tuple[int, int]) -> Path:
    """The file of one process: `answers-00001-of-00004.jsonl`; of a single one the name itself."""
    index, count = part
    if count == 1:
        return target
    return target.with_name(f"{target.stem}-{index:05}-of-{count:05}{target.suffix}")


def _lines(source: Path, part: tuple[int, int]) -> Iterator[tuple[int, bytes]]:
    """Numbers (from 1) and lines of this process's share; blank ones do not count."""
    index, count = part
    with source.open("rb") as lines:
        entries = lines if (listed := _list(source)) is None else map(_line, listed)
        rows = ((number, line) for number, line in enumerate(entries, 1) if line.strip())
        yield from itertools.islice(rows, index, None, count)


def _line(entry: Any) -> bytes:
    return json.dumps(entry).encode()


def _list(source: Path) -> list[Any] | None:
    """The rows of a file that is one JSON list of them, as LLaVA's are; None if it has lines.

    A list of messages is a line.
    """
    with source.open("rb") as file:
        if not file.read(1024).lstrip().startswith(b"["):
            return None
    try:
        value = json.loads(source.read_bytes())
    except (ValueError, RecursionError):
        return None
    keys = {key for entry in value if isinstance(entry, dict) for key in entry}
    return value if keys & {*CONVERSATION_KEYS} else None


def _key(line: bytes, settings: bytes) -> str:
    return hashlib.blake2b(settings + b"\0" + line.strip(), digest_size=8).hexdigest()


def _resume(
    source: Path, out: BinaryIO, target: Path, settings: bytes, part: tuple[int, int]
) -> tuple[int, int, int]:
    """Rows in all, rows answered before, and bad ones of these; cuts off half a line."""
    if not any(True for _, line in itertools.islice(_lines(source, (0, 1)), 1)):
        raise UserError(f"{source}: no rows; expected one JSON object per line")
    out.seek(0)
    bad = done = end = total = 0
    written = iter(out)
    for number, line in _lines(source, part):
        total += 1
        answer = next(written, b"")
        if not answer.endswith(b"\n"):
            continue
        if (found := _parsed(answer)).get("key") != _key(line, settings):
            raise UserError(
                f"{target}: line {total} does not answer row {number} of {source} with these"
                " flags; remove it, or choose another --out"
            )
        done, end, bad = total, end + len(answer), bad + ("error" in found)
    if next(written, b"").endswith(b"\n"):
        raise UserError(f"{target} answers more rows than {source} has; choose another --out")
    out.truncate(end)
    return total, done, bad


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _Run:
    """The rows under way, in order."""

    def __init__(self, session: Session, source: Path, settings: bytes, part: tuple[int, int]):
        self._session, self._source = session, source
        self._settings, self._part = settings, part
        self._rows: deque[Row] = deque()
        self._tokens = 0

    def write(self, out: BinaryIO, batch_size: int, done: int, total: int) -> int:
        """Answers all rows but the first `done`; the number of bad ones among them."""
        status, started = StatusLine(), time.monotonic()
        before, bad = done, 0
        if done == total:
            return 0
        engine = self._session.engine(batch_size)
        steps = itertools.chain(engine.run(self._answers(engine, done)), [[]])
        for events in steps:
            self._tokens += sum(row.done and len(row.answer.tokens) for row, _ in events)
            while self._rows and self._rows[0].done:
                row = self._rows.popleft()
                # Half a surrogate pair in an id is written as the escape that it was read as.
                out.write((row.line + "\n").encode("utf-8", "backslashreplace"))
                out.flush()
                done, bad = done + 1, bad + (row.answer is None)
            now = time.monotonic()
            if status.due(now) or (status.is_terminal and done == total):
                status.show(self._line(done, total, done - before, now - started), now)
        status.end()
        return bad

    def _answers(self, engine: Engine, skip: int) -> Iterator[RowAnswer]:
        """The good rows; all rows go to the end of the queue on their way."""
        token = self._session.processor.tokenizer.image_token
        for number, line in itertools.islice(_lines(self._source, self._part), skip, None):
            names: dict[str, Any] = {"row": number, "key": _key(line, self._settings)}
            if (identity := _parsed(line).get("id")) is not None:  # of a bad row as well
                names["id"] = identity
            try:
                request = parse_question(line, self._source.parent, image_token=token)
                sample = self._session.prepare(request)
            except (UserError, OSError) as error:
                self._rows.append(Row(names, error=str(error)))
                continue
            answer = self._session.row(engine, sample)
            self._rows.append(Row(names, sample, answer))
            yield answer

    def _line(self, done: int, total: int, fresh: int, seconds: float) -> str:
        text = f"answering {done / total:4.0%} {bar(done / total)} {done} of {total} rows"
        text += f", {human_count(self._tokens / max(seconds, 1e-6))} tokens/s"
        if fresh and done < total:
            text += f", {human_time(seconds / fresh * (total - done))} left"
        return text
