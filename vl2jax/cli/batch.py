"""Answers to a file of requests: JSON lines, or a JSON list, in; JSON lines out, in the same order.

A run that ended early, however, goes on where it stopped when it is started again.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vl2jax.cli.output import json_line, record
from vl2jax.common.errors import UserError
from vl2jax.common.file_lock import lock_directory
from vl2jax.common.progress import Progress, human_count
from vl2jax.inference.engine import Engine
from vl2jax.inference.request import CONVERSATION_KEYS, parse_question
from vl2jax.inference.sequence import Sequence
from vl2jax.inference.session import Session
from vl2jax.processing.collate import Sample


@dataclasses.dataclass(frozen=True)
class BatchRow:
    """One line of the input, taken in.

    Attributes:
      names: what leads its output: `row`, the number of its line, `key`, by which a later run knows
        line and flags again, and `id` if it has one.
      sample: what to answer; None for a bad row.
      sequence: of a good row, its answer under way.
      error: what is wrong with a bad row.
    """

    names: dict[str, Any]
    sample: Sample | None = None
    sequence: Sequence | None = None
    error: str | None = None

    @property
    def done(self) -> bool:
        return self.sequence is None or self.sequence.done

    @property
    def read(self) -> dict[str, Any]:
        """What was read, in short: processes that answer it together must have read the same."""
        found = self.error if self.sequence is None else self.sequence.prompt.digest
        return self.names | {"found": found}

    @property
    def line(self) -> str:
        if self.sequence is None or self.sample is None:
            return json_line(self.names | {"error": {"message": self.error}})
        return json_line(self.names | record(self.sequence.result(), self.sample))


def answer_batch(
    session: Session,
    source: Path,
    target: Path,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
    skip: int = 0,
) -> int:
    """Answers each line of `source`, or each element of the list that it is, as
    `request.parse_question` reads it.

    Each answer is in `target` as soon as it and all before it are done; a bad row has an `error`
    there.  Rows that `target` answers already are left as they are.

    Args:
      batch_size: rows that are answered together.
      part: index and count of processes; each answers every count-th row, into a file of its own
        (`shard_path`).
      skip: first rows that are answered elsewhere; those behind are shared.

    Returns:
      The number of bad rows in its file.

    Raises:
      UserError: no rows, or a `target` that answers other rows or was made with other flags.
    """
    target = shard_path(target, part)
    requests = RequestFile(source, session.settings, part, skip)
    with open_output(target) as out:
        total, done, bad = resume(requests, out, target)
        if done:
            print(f"{target}: {done} of {total} rows are answered already", file=sys.stderr)
        bad += BatchRun(session, requests).write(out, batch_size, done, total)
    print(f"{target}: {total} rows, {bad} of them with an error", file=sys.stderr)
    return bad


@contextlib.contextmanager
def open_output(target: Path) -> Iterator[BinaryIO]:
    """A file of answers, to be read and continued by this process alone.

    Raises:
      UserError: another process has it.
    """
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(target.open("a+b"))
        try:
            lock_directory(target, stack)
        except BlockingIOError as error:
            raise UserError(f"{target}: another process is writing it") from error
        yield out


def shard_path(target: Path, part: tuple[int, int]) -> Path:
    """The file of one process: `answers-00001-of-00004.jsonl`; of a single one the name itself."""
    index, count = part
    if count == 1:
        return target
    return target.with_name(f"{target.stem}-{index:05}-of-{count:05}{target.suffix}")


class RequestFile:
    """The rows of a file that one process is asked, and how each is known again.

    Attributes:
      source: the file.
    """

    def __init__(
        self, source: Path, settings: Mapping[str, Any], part: tuple[int, int] = (0, 1), skip=0
    ):
        """
        Args:
          settings: all that answers depend on besides their rows.
          part, skip: see `answer_batch`.
        """
        self.source = source
        self._settings = json.dumps(settings, sort_keys=True).encode()
        self._part, self._skip = part, skip

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbers (from 1) and lines; blank ones do not count."""
        index, count = self._part
        return itertools.islice(_lines(self.source), self._skip + index, None, count)

    def key(self, line: bytes) -> str:
        """By which an answer is known to be that of a line, with these settings."""
        return hashlib.blake2b(self._settings + b"\0" + line.strip(), digest_size=8).hexdigest()

    def check(self) -> None:
        """Raises UserError if the file has no rows at all."""
        if not any(True for _ in itertools.islice(_lines(self.source), 1)):
            raise UserError(f"{self.source}: no rows; expected one JSON object per line")


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers (from 1) and lines of a file; blank ones do not count."""
    with source.open("rb") as lines:
        entries = lines if (listed := _list(source)) is None else map(_line, listed)
        yield from ((number, line) for number, line in enumerate(entries, 1) if line.strip())


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


def resume(requests: RequestFile, out: BinaryIO, target: Path) -> tuple[int, int, int]:
    """Rows in all, rows answered before, and bad ones of these; cuts off half a line.

    Raises:
      UserError: no rows, or `out` answers others, or with other settings.
    """
    requests.check()
    out.seek(0)
    bad = done = end = total = 0
    written = iter(out)
    for number, line in requests.lines():
        total += 1
        answer = next(written, b"")
        if not answer.endswith(b"\n"):
            continue
        if (found := _parsed(answer)).get("key") != requests.key(line):
            raise UserError(
                f"{target}: line {total} does not answer row {number} of {requests.source} with"
                " these flags; remove it, or choose another --out"
            )
        done, end, bad = total, end + len(answer), bad + ("error" in found)
    if next(written, b"").endswith(b"\n"):
        raise UserError(
            f"{target} answers more rows than {requests.source} has; choose another --out"
        )
    out.truncate(end)
    return total, done, bad


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class BatchRun:
    """The rows under way, in order."""

    def __init__(
        self,
        session: Session,
        requests: RequestFile,
        check_equal: Callable[[Any, str], None] | None = None,
    ):
        """
        Args:
          check_equal: called with what this process has read of each row, and a name of the row.
        """
        self._session, self._requests, self._check_equal = (
            session,
            requests,
            check_equal,
        )
        self._rows: deque[BatchRow] = deque()
        self._tokens = 0

    def write(self, out: BinaryIO | None, batch_size: int, done: int, total: int) -> int:
        """Answers all rows but the first `done`; the number of bad ones among them.

        Without `out` nothing is written: another process has the same answers and does that.
        """
        if done == total:
            return 0
        bad = 0
        engine = self._session.engine(batch_size)
        steps = itertools.chain(engine.run(self._answers(engine, done)), [[]])
        with Progress("answering", total, "rows", done=done) as progress:
            for events in steps:
                self._tokens += sum(row.done and len(row.answer.tokens) for row, _ in events)
                ended = 0
                while self._rows and self._rows[0].done:
                    row = self._rows.popleft()
                    if out is not None:
                        # Half a surrogate pair in an id is written as the escape it was read as.
                        out.write((row.line + "\n").encode("utf-8", "backslashreplace"))
                        out.flush()
                    ended, bad = ended + 1, bad + (row.sequence is None)
                rate = self._tokens / progress.seconds
                progress.update(ended, f"{human_count(rate)} tokens/s")
        return bad

    def _answers(self, engine: Engine, skip: int) -> Iterator[Sequence]:
        """The good rows; all rows go to the end of the queue on their way."""
        requests = self._requests
        for number, line in itertools.islice(requests.lines(), skip, None):
            names: dict[str, Any] = {"row": number, "key": requests.key(line)}
            if (identity := _parsed(line).get("id")) is not None:  # of a bad row as well
                names["id"] = identity
            try:
                request = parse_question(line, requests.source.parent)
                sample = self._session.prepare(request)
                row = BatchRow(names, sample, self._session.row(engine, sample))
            except (UserError, OSError) as error:
                row = BatchRow(names, error=str(error))
            if self._check_equal is not None:
                self._check_equal(row.read, f"row {number}")
            self._rows.append(row)
            if row.sequence is not None:
                yield row.sequence
