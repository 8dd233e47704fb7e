"""Answers a file of requests: reads any file of training data, writes JSON lines in its order.

An interrupted run resumes where it stopped if it is started again.
"""

import dataclasses
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vl2jax.cli.batch_files import RequestFile, merge, open_output, resume, shard_path
from vl2jax.cli.output import json_line, record
from vl2jax.common.errors import UserError, clip
from vl2jax.common.progress import Progress, human_count
from vl2jax.data.files import open_rows
from vl2jax.data.formats import MOST
from vl2jax.data.unread import UnreadKeys
from vl2jax.inference.engine import Engine
from vl2jax.inference.request import read_question_at
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
      sequences: the answers that are being generated, one or `n`; empty for a bad row.
      error: error message of a bad row.
    """

    names: dict[str, Any]
    sample: Sample | None = None
    sequences: tuple[Sequence, ...] = ()
    error: str | None = None

    @property
    def done(self) -> bool:
        """Whether its answers are complete, or it is a bad row."""
        return all(sequence.done for sequence in self.sequences)

    @property
    def failed(self) -> bool:
        """Whether it is a bad row, or one of its answers ended with an error."""
        return self.error is not None or any(one.answer.error for one in self.sequences)

    @property
    def read(self) -> dict[str, Any]:
        """A digest of the row, which must be equal on all processes that answer it together."""
        found = self.sequences[0].prompt.digest if self.sequences else self.error
        return self.names | {"found": found}

    @property
    def line(self) -> str:
        """Its output, as JSON on one line."""
        if self.sample is None:
            return json_line(self.names | {"error": {"message": self.error}})
        answers = [record(sequence.result(), self.sample) for sequence in self.sequences]
        if len(answers) == 1:
            return json_line(self.names | answers[0])
        errors = [{"error": answer["error"]} for answer in answers if "error" in answer]
        return json_line({**self.names, "answers": answers, **(errors[0] if errors else {})})


@dataclasses.dataclass(frozen=True)
class Answered:
    """What a file of answers has.

    Attributes:
      total: number of rows.
      bad: number of rows with an error.
      failed: places, from 0, of the rows that had an error before this run.
    """

    total: int
    bad: int
    failed: tuple[int, ...]


def answer_batch(
    session: Session,
    source: Path,
    target: Path,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
    *,
    retry_errors: bool = False,
) -> int:
    """Answers the rows of a file.

    An answer is written as soon as it and all answers before it are complete.  For a bad row, an
    `error` is written instead.  Rows whose answers are already in `target` are not answered again.

    Args:
      session: session with the checkpoint.
      source: file of requests in any format of training data, see `data.files.open_rows`.
      target: file to write; with several processes, see `shard_path`.
      batch_size: maximum number of rows answered at the same time.
      part: index of this process and number of processes; each answers every count-th row.
      retry_errors: whether to answer rows again that have an error in `target`.

    Returns:
      The number of bad rows in the file of this process.

    Raises:
      UserError: the source cannot be read or has no rows, or `target` has answers to other rows or
        with other settings.
    """
    target = shard_path(target, part)
    requests = RequestFile(open_rows(source), session.settings, retry_errors=retry_errors)

    def answer(requests: RequestFile, target: Path) -> Answered:
        return answer_rows(session, requests, target, batch_size)

    answered = answer_with_retries(answer, requests.part(*part), target)
    print(f"{target}: {answered.total} rows, {answered.bad} of them with an error", file=sys.stderr)
    return answered.bad


def answer_rows(session: Session, requests: RequestFile, target: Path, batch_size: int) -> Answered:
    """Answers the rows that `target` does not have yet, in one process."""
    with open_output(target) as out:
        begun = resume(requests, out, target)
        begun.print(target)
        bad = BatchRun(session, requests).write(out, batch_size, begun.done, begun.total)
    return Answered(begun.total, begun.bad + bad, begun.failed)


def answer_with_retries(
    answer: Callable[[RequestFile, Path], Answered],
    requests: RequestFile,
    target: Path,
    *,
    merges: bool = True,
) -> Answered:
    """Answers all rows; then, if asked to, those again that had an error before.

    The new answers are written to a file beside `target` first, so that a retry that is interrupted
    is continued, and `target` is replaced in one step.

    Args:
      answer: answers requests into a file.
      requests: the rows.
      target: file of answers.
      merges: whether this process writes `target`.
    """
    first = answer(requests, target)
    if not (requests.retry_errors and first.failed):
        return first
    side = target.with_name(f".{target.name}.retry")
    print(f"{target}: {len(first.failed)} rows with an error are answered again", file=sys.stderr)
    again = answer(requests.only(first.failed), side)
    if merges:
        merge(target, side, first.failed)
    return Answered(first.total, first.bad - len(first.failed) + again.bad, first.failed)


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
        self._session, self._requests, self._check_equal = session, requests, check_equal
        self._unread = UnreadKeys(print)  # replaced by `write`
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
            self._unread = UnreadKeys(progress.note)
            for events in steps:
                self._tokens += sum(row.done and len(row.answer.tokens) for row, _ in events)
                ended = 0
                while self._rows and self._rows[0].done:
                    row = self._rows.popleft()
                    if out is not None:
                        # An unpaired surrogate in an id is written as its escape sequence.
                        out.write((row.line + "\n").encode("utf-8", "backslashreplace"))
                        out.flush()
                    ended, bad = ended + 1, bad + row.failed
                rate = self._tokens / progress.seconds
                progress.update(ended, f"{human_count(rate)} tokens/s")
        return bad

    def _answers(self, engine: Engine, skip: int) -> Iterator[Sequence]:
        """Reads rows, appends them to the queue, and yields the sequences of good rows."""
        requests, rows = self._requests, self._requests.rows
        for index in requests.indices[skip:]:
            names: dict[str, Any] = {"row": rows.number(index), "key": requests.key(index)}
            try:
                names |= _identity(rows.value(index))  # bad rows have it, too
                request = read_question_at(rows, index)
                self._unread.add(str(rows.path), request.unread)
                sample = self._session.prepare(request)
                row = BatchRow(names, sample, tuple(self._session.rows(engine, sample)))
            except (UserError, OSError) as error:
                row = BatchRow(names, error=clip(str(error), MOST))
            if self._check_equal is not None:
                again = " again" if requests.again else ""
                self._check_equal(row.read, f"row {names['row']}{again}")
            self._rows.append(row)
            yield from row.sequences


def _identity(value: Any) -> dict[str, Any]:
    """The `id` of a row, if it has one."""
    identity = value.get("id") if isinstance(value, Mapping) else None
    return {} if identity is None else {"id": identity}
