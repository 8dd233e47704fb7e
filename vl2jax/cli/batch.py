"""Answers a file of requests: reads JSON lines or a JSON list, writes JSON lines in the same order.

An interrupted run resumes where it stopped if it is started again.
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
from vl2jax.data.keys import ROW_KEYS
from vl2jax.inference.engine import Engine
from vl2jax.inference.request import parse_question
from vl2jax.inference.sequence import Sequence
from vl2jax.inference.session import Session
from vl2jax.processing.collate import Sample


@dataclasses.dataclass(frozen=True)
class BatchRow:
    """One row of the input.

    Attributes:
      names: first entries of its output: `row`, its line number; `key`, a hash of the line and the
        settings, by which a later run recognises it; and `id`, if it has one.
      sample: the prompt; None for a bad row.
      sequence: the sequence that is being generated; None for a bad row.
      error: error message of a bad row.
    """

    names: dict[str, Any]
    sample: Sample | None = None
    sequence: Sequence | None = None
    error: str | None = None

    @property
    def done(self) -> bool:
        """Whether its answer is complete, or it is a bad row."""
        return self.sequence is None or self.sequence.done

    @property
    def read(self) -> dict[str, Any]:
        """A digest of the row, which must be equal on all processes that answer it together."""
        found = self.error if self.sequence is None else self.sequence.prompt.digest
        return self.names | {"found": found}

    @property
    def line(self) -> str:
        """Its output, as JSON on one line."""
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
    """Answers the rows of a file.

    An answer is written as soon as it and all answers before it are complete.  For a bad row, an
    `error` is written instead.  Rows whose answers are already in `target` are not answered again.

    Args:
      session: session with the checkpoint.
      source: file with one request per line, or one JSON list of requests; see
        `request.parse_question`.
      target: file to write; with several processes, see `shard_path`.
      batch_size: maximum number of rows answered at the same time.
      part: index of this process and number of processes; each answers every count-th row.
      skip: number of rows at the start of the file that no process answers.

    Returns:
      The number of bad rows in the file of this process.

    Raises:
      UserError: the source has no rows, or `target` has answers to other rows or with other
        settings.
    """
    target = shard_path(target, part)
    requests = RequestFile(source, session.settings, part, skip)
    with open_output(target) as out:
        total, done, bad = resume(requests, out, target)
        if done:
            print(f"{target}: {done} of {total} rows are already answered", file=sys.stderr)
        bad += BatchRun(session, requests).write(out, batch_size, done, total)
    print(f"{target}: {total} rows, {bad} of them with an error", file=sys.stderr)
    return bad


@contextlib.contextmanager
def open_output(target: Path) -> Iterator[BinaryIO]:
    """Opens and locks a file of answers, to read it and append to it.

    Raises:
      UserError: another process has locked it.
    """
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(target.open("a+b"))
        try:
            lock_directory(target, stack)
        except BlockingIOError as error:
            raise UserError(f"{target}: another process is writing it") from error
        yield out


def shard_path(target: Path, part: tuple[int, int]) -> Path:
    """Path of the file of one process: `answers-00001-of-00004.jsonl`.

    Args:
      target: path of the joined file; a single process writes it directly.
      part: index of the process and number of processes.
    """
    index, count = part
    if count == 1:
        return target
    return target.with_name(f"{target.stem}-{index:05}-of-{count:05}{target.suffix}")


class RequestFile:
    """The rows of a file that one process answers, with a key for each.

    Attributes:
      source: the file.
    """

    def __init__(
        self, source: Path, settings: Mapping[str, Any], part: tuple[int, int] = (0, 1), skip=0
    ):
        """
        Args:
          source: the file.
          settings: all settings that the answers depend on.
          part, skip: see `answer_batch`.
        """
        self.source = source
        self._settings = json.dumps(settings, sort_keys=True).encode()
        self._part, self._skip = part, skip

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields line number (from 1) and line of the rows of this process, without blank lines."""
        index, count = self._part
        return itertools.islice(_lines(self.source), self._skip + index, None, count)

    def key(self, line: bytes) -> str:
        """Hash of a line and the settings, by which its answer is recognised."""
        return hashlib.blake2b(self._settings + b"\0" + line.strip(), digest_size=8).hexdigest()

    def check(self) -> None:
        """Raises UserError if the file has no rows at all."""
        if not any(True for _ in itertools.islice(_lines(self.source), 1)):
            raise UserError(f"{self.source}: no rows; expected one JSON object per line")


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Yields line number (from 1) and line of all rows of a file, without blank lines."""
    with source.open("rb") as lines:
        entries = lines if (listed := _list(source)) is None else map(_line, listed)
        yield from ((number, line) for number, line in enumerate(entries, 1) if line.strip())


def _line(entry: Any) -> bytes:
    return json.dumps(entry).encode()


def _list(source: Path) -> list[Any] | None:
    """Reads a file that is one JSON list of rows, as in LLaVA; returns None if it has JSON lines.

    A list of messages is a single row, so it is not such a list.
    """
    with source.open("rb") as file:
        if not file.read(1024).lstrip().startswith(b"["):
            return None
    try:
        value = json.loads(source.read_bytes())
    except (ValueError, RecursionError):
        return None
    keys = {key for entry in value if isinstance(entry, dict) for key in entry}
    return value if keys & {*ROW_KEYS} else None


def resume(requests: RequestFile, out: BinaryIO, target: Path) -> tuple[int, int, int]:
    """Checks the answers of an interrupted run and removes an incomplete last line.

    Args:
      requests: the rows.
      out: file of answers, open for reading and appending.
      target: its path, for messages.

    Returns:
      Number of rows, number of answered rows, and number of bad rows among them.

    Raises:
      UserError: the source has no rows, or `out` has answers to other rows or with other settings.
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
            f"{target} has answers to more rows than {requests.source}; choose another --out"
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
    """Answers rows and writes the answers in the order of the rows."""

    def __init__(
        self,
        session: Session,
        requests: RequestFile,
        check_equal: Callable[[Any, str], None] | None = None,
    ):
        """
        Args:
          session: session with the checkpoint.
          requests: the rows.
          check_equal: called with a digest and a name of each row, to check that all processes have
            read the same; None: no check.
        """
        self._session, self._requests, self._check_equal = (
            session,
            requests,
            check_equal,
        )
        self._rows: deque[BatchRow] = deque()
        self._tokens = 0

    def write(self, out: BinaryIO | None, batch_size: int, done: int, total: int) -> int:
        """Answers all rows except for the first `done` ones.

        Args:
          out: file of answers; None: writes nothing, because another process writes the same
            answers.
          batch_size: maximum number of rows answered at the same time.
          done: number of rows that are already answered.
          total: number of rows.

        Returns:
          The number of bad rows among those that it answered.
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
                        # An unpaired surrogate in an id is written as its escape sequence.
                        out.write((row.line + "\n").encode("utf-8", "backslashreplace"))
                        out.flush()
                    ended, bad = ended + 1, bad + (row.sequence is None)
                rate = self._tokens / progress.seconds
                progress.update(ended, f"{human_count(rate)} tokens/s")
        return bad

    def _answers(self, engine: Engine, skip: int) -> Iterator[Sequence]:
        """Reads rows, appends them to the queue, and yields the sequences of good rows."""
        requests = self._requests
        for number, line in itertools.islice(requests.lines(), skip, None):
            names: dict[str, Any] = {"row": number, "key": requests.key(line)}
            if (identity := _parsed(line).get("id")) is not None:  # bad rows have it, too
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
