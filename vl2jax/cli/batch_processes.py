"""`--batch` with several processes of one run.

If the rows are sharded, each process writes the answers to its rows to its own file
(`batch.shard_path`).  When all processes are done, process 0 appends these answers to OUT, in the
order of the rows, and removes the files.  If the processes work together on one mesh, all of them
answer every row, and process 0 writes OUT.  In both cases, OUT always contains a prefix of the
result, and an interrupted run can be resumed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

from vl2jax.cli.batch import Answered, BatchRun, answer_rows, answer_with_retries
from vl2jax.cli.batch_files import Begun, RequestFile, open_output, resume, shard_path
from vl2jax.cli.shards import Shard
from vl2jax.common.errors import UserError
from vl2jax.data.files import open_rows
from vl2jax.inference.session import Session
from vl2jax.parallel.processes import (
    assert_equal_across_processes,
    broadcast_from_process_0,
    gather_to_process_0,
    is_process_0,
)


def answer_batch_by_processes(
    session: Session,
    source: Path,
    target: Path,
    batch_size: int,
    shard: Shard,
    *,
    retry_errors: bool = False,
) -> int:
    """Answers the rows of a file; all processes of a run must call it.

    Args:
      session: session with the checkpoint.
      source: file of requests, the same on all processes.
      target: file to write, on a file system that all processes share.
      batch_size: maximum number of rows that a process answers at the same time.
      shard: mesh and share of this process.
      retry_errors: see `answer_batch`.

    Returns:
      The number of bad rows in the whole file, on every process.

    Raises:
      UserError: see `answer_batch`; also if there are files of another number of processes, or if
        the processes read different rows.
    """
    if not source.is_file():
        raise UserError(f"{source} is not a file; several processes cannot read one pipe")
    with source.open("rb") as file:
        assert_equal_across_processes(
            {"digest": hashlib.file_digest(file, "blake2b").hexdigest()[:16]}, str(source)
        )
    requests = RequestFile(open_rows(source), session.settings, retry_errors=retry_errors)

    def answer(requests: RequestFile, target: Path) -> Answered:
        return _answer_by_processes(session, requests, target, batch_size, shard)

    answered = answer_with_retries(answer, requests, target, merges=is_process_0())
    print(f"{target}: {answered.total} rows, {answered.bad} of them with an error", file=sys.stderr)
    return answered.bad


def _answer_by_processes(
    session: Session, requests: RequestFile, target: Path, batch_size: int, shard: Shard
) -> Answered:
    """Answers the rows that `target` does not have yet, together."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open_output(target)) if is_process_0() else None
        begun = Begun(0, 0, 0, ())
        if out is not None:
            begun = resume(requests, out, target)
            _refuse_other_parts(target, shard.count)
        name = target.name  # facts are shared once under each name
        facts = json.dumps(dataclasses.astuple(begun))
        shared = broadcast_from_process_0(f"rows done before in {name}", facts)
        total, done, bad, failed = json.loads(shared)
        begun = Begun(total, done, bad, tuple(failed))
        begun.print(target)
        if shard.together:
            bad += BatchRun(session, requests, assert_equal_across_processes).write(
                out, batch_size, done, total
            )
        elif done < total:
            own = answer_rows(
                session,
                requests.part(shard.index, shard.count, skip=done),
                shard_path(target, (shard.index, shard.count)),
                batch_size,
            )
            found = gather_to_process_0(f"bad rows in {name}", str(own.bad))
            if out is not None:
                _append_parts(target, out, shard.count)
            everywhere = str(sum(map(int, found)))
            bad += int(broadcast_from_process_0(f"bad rows in all of {name}", everywhere))
        if is_process_0():
            for part in _parts(target, shard.count):
                part.unlink(missing_ok=True)
    return Answered(total, bad, begun.failed)


def _parts(target: Path, count: int) -> list[Path]:
    return [shard_path(target, (index, count)) for index in range(count)] if count > 1 else []


def _refuse_other_parts(target: Path, count: int) -> None:
    """Raises UserError if there are files of a run with another number of processes."""
    form = re.escape(target.stem) + r"-\d{5}-of-\d{5}" + re.escape(target.suffix)
    own = {path.name for path in _parts(target, count)}
    for path in sorted(target.parent.iterdir()):
        if re.fullmatch(form, path.name) and path.name not in own:
            others = int(path.stem[-5:])
            raise UserError(
                f"{path} was written by an unfinished run with {others} processes; resume with the"
                " same number, or remove the file"
            )


def _append_parts(target: Path, out: BinaryIO, count: int) -> None:
    """Appends the answers of all processes to `target` atomically, in the order of the rows."""
    partial = target.with_name(f".{target.name}.partial")
    with contextlib.ExitStack() as stack:
        joined = stack.enter_context(partial.open("wb"))
        out.seek(0)
        shutil.copyfileobj(out, joined)
        parts = []
        for index, path in enumerate(_parts(target, count)):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist here, but process {index} has written it; --out must be"
                    " on a file system that all processes share"
                )
            parts.append(stack.enter_context(path.open("rb")))
        while any(lines := [part.readline() for part in parts]):
            joined.writelines(lines)  # readline returns b"" at the end of a part
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(partial, target)
