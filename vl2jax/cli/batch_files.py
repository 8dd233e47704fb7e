"""The files of `--batch`: the requests with a key for each, and the answers that they have."""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from vl2jax.common.errors import UserError
from vl2jax.common.file_lock import lock_directory
from vl2jax.data.file_source import FileSource

Indices = range | tuple[int, ...]


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
      rows: the file.
      indices: numbers of the rows in the file, from 0.
      retry_errors: whether rows with an error are answered again.
      again: whether this is such a second try, whose old answers are dropped if they are others.
    """

    def __init__(
        self,
        rows: FileSource,
        settings: Mapping[str, Any],
        indices: Indices | None = None,
        *,
        retry_errors: bool = False,
        again: bool = False,
    ):
        """
        Args:
          rows: the file.
          settings: all settings that the answers depend on.
          indices: numbers of the rows; None: all.
          retry_errors: whether rows with an error are answered again.
          again: whether this is such a second try.
        """
        self.rows = rows
        self.indices = range(len(rows)) if indices is None else indices
        self.retry_errors, self.again = retry_errors, again
        self._settings = settings
        self._hashed = json.dumps(settings, sort_keys=True).encode()

    def part(self, index: int, count: int, skip: int = 0) -> "RequestFile":
        """Returns the rows of one of several processes, without the first `skip` of all."""
        chosen = self.indices[skip + index :: count]
        options = {"retry_errors": self.retry_errors, "again": self.again}
        return RequestFile(self.rows, self._settings, chosen, **options)

    def only(self, places: Indices) -> "RequestFile":
        """Returns the rows at these places, for a second try."""
        chosen = tuple(self.indices[place] for place in places)
        return RequestFile(self.rows, self._settings, chosen, again=True)

    def key(self, index: int) -> str:
        """Hash of row `index` of the file and the settings, by which its answer is recognised."""
        content = self._hashed + b"\0" + self.rows.content(index)
        return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Begun:
    """The answers of an interrupted run.

    Attributes:
      total: number of rows.
      done: number of answered rows.
      bad: number of bad rows among them.
      failed: their places, from 0.
    """

    total: int
    done: int
    bad: int
    failed: tuple[int, ...]

    def print(self, target: Path) -> None:
        """Says how many rows are answered, if any."""
        if self.done:
            print(
                f"{target}: {self.done} of {self.total} rows are already answered", file=sys.stderr
            )


def resume(requests: RequestFile, out: BinaryIO, target: Path) -> Begun:
    """Checks the answers of an interrupted run and removes an incomplete last line.

    Args:
      requests: the rows.
      out: file of answers, open for reading and appending.
      target: its path, for messages.

    Raises:
      UserError: `out` has answers to other rows or with other settings.  A row with an error may
        be another one if it is answered again, because it may have been corrected.
    """
    out.seek(0)
    end, failed, done = 0, [], 0
    written = iter(out)
    for place, index in enumerate(requests.indices):
        answer = next(written, b"")
        if not answer.endswith(b"\n"):
            break
        found = _parsed(answer)
        if found.get("key") != requests.key(index):
            if requests.again:
                break
            if not (requests.retry_errors and "error" in found):
                raise UserError(
                    f"{target}: line {place + 1} does not answer row"
                    f" {requests.rows.number(index)} of {requests.rows.path} with these flags;"
                    " remove it, or choose another --out"
                )
        done, end = place + 1, end + len(answer)
        if "error" in found:
            failed.append(place)
    if done == len(requests.indices) and next(written, b"").endswith(b"\n") and not requests.again:
        raise UserError(
            f"{target} has answers to more rows than {requests.rows.path}; choose another --out"
        )
    out.truncate(end)
    return Begun(len(requests.indices), done, len(failed), tuple(failed))


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def merge(target: Path, side: Path, places: tuple[int, ...]) -> None:
    """Puts the answers of `side` into `target` atomically, at these places; removes `side`."""
    partial = target.with_name(f".{target.name}.partial")
    chosen = set(places)
    with target.open("rb") as old, side.open("rb") as new, partial.open("wb") as joined:
        for place, line in enumerate(old):
            joined.write(new.readline() if place in chosen else line)
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(partial, target)
    side.unlink()
