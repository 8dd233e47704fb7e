"""Shared by both conversions: atomic output directories, threads, and error messages."""

import collections
import concurrent.futures
import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from convert.ownership import STAGING
from convert.stopping import Interrupted
from vl2jax.cli.command import run_cli
from vl2jax.common.errors import UserError, clip, storage_failure
from vl2jax.common.file_lock import lock_directory
from vl2jax.common.progress import human_bytes

_NOTHING_LEFT = "nothing was left behind; run it again"
_REMOVAL_SECONDS, _SETTLE_SECONDS = 5.0, 0.2
_THREADS = 2  # each needs memory for a piece of at most `pieces.PIECE_BYTES`, and copies of it


@contextlib.contextmanager
def staged_directory(
    out: Path, nbytes: int, not_ours: Callable[[Path], str | None] | None = None
) -> Iterator[Path]:
    """Context manager that gives a directory to fill, and renames it to `out` on success.

    The block writes to `OUT.partial` next to `out`.  It is removed if the block fails; if it cannot
    be removed, a note on the error says so.  The next run removes what a killed run left there.

    Args:
      out: the output directory.
      nbytes: upper bound of the bytes to write; it is an error if less space is free.
      not_ours: returns why an existing directory `out` may not be replaced; None: it never may.

    Yields:
      The directory to write to.

    Raises:
      UserError: `out` exists and may not be replaced, another run is writing it, or there is not
        enough free space.
    """
    out = Path(out).resolve()  # through links, so that the renames stay within one file system
    _check_target(out, not_ours)
    partial = out.with_name(out.name + ".partial")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_made_parents(out))
        if partial.exists() or partial.is_symlink():
            _check_leftover(partial)
            _lock(partial, stack)  # fails if another run holds it; otherwise it is left over
            shutil.rmtree(partial)
        _check_space(out.parent, nbytes)
        partial.mkdir()
        (partial / STAGING).touch()
        _lock(partial, stack)
        try:
            yield partial
            _publish(partial, out, not_ours)
        except BaseException as error:
            if (left := _remove(partial)) is not None:
                error.add_note(left)
            raise


@contextlib.contextmanager
def _made_parents(path: Path) -> Iterator[None]:
    """Makes the parents of a path; removes those that it made if the block fails."""
    made = [parent for parent in path.parents if not parent.exists()]  # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: another program uses it
            for parent in made:
                parent.rmdir()
        raise


def _remove(directory: Path) -> str | None:
    """Removes a directory; returns a message if it could not be removed.

    After an error, a storage library may still finish some writes and so recreate the directory.
    Therefore it is removed until it stays away for a moment.
    """
    deadline, reason = time.monotonic() + _REMOVAL_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:
            pass
        except OSError as error:
            reason = f" ({error.strerror})"
        time.sleep(_SETTLE_SECONDS)
        if not directory.exists():
            return None
    return f"{directory} could not be removed{reason}"


def run_on_cpu(main: Callable[[], None]) -> int:
    """Runs the command line of a conversion on CPU.

    Conversion needs no accelerator, and must not take one from a training run.  JAX is already
    imported and does not read the environment any more, so its config is set, unless the user has
    set JAX_PLATFORMS.

    Args:
      main: the command.

    Returns:
      The exit code, as `run_cli` returns it.
    """
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    return run_cli(lambda: _until_interrupted(main), interrupted=f"interrupted: {_NOTHING_LEFT}")


def _until_interrupted(main: Callable[[], None]) -> int:
    """Runs `main`; after a signal or an error the message says what is left on disk."""
    try:
        main()
        return 0
    except (UserError, OSError) as error:
        notes = getattr(error, "__notes__", [])
        if not notes:
            raise
        raise UserError("; ".join([str(error), *notes])) from error
    except Interrupted as error:
        what = "; ".join(getattr(error, "__notes__", [_NOTHING_LEFT]))
        print(f"\ninterrupted: {what}", file=sys.stderr, flush=True)
        if error.still_running:  # Python's normal exit would wait for its threads
            os._exit(error.exit_code)
        return error.exit_code


def map_ahead(function: Callable, items: Iterable) -> Iterator:
    """Yields `function(item)` in order, and computes the next few results ahead in threads."""
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def parse_bytes(text: str) -> int:
    """Parses a size such as `5GB`, `500MB` or `1.5GiB`.

    Returns:
      The size in bytes.

    Raises:
      ValueError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?)?B?\s*", text)
    if not match:
        raise ValueError(f"expected a size such as 5GB, got {text!r}")
    number, unit = match.groups()
    base = 1024 if unit and unit.endswith("i") else 1000
    size = int(float(number) * base ** ("kMGT".index(unit[0]) + 1 if unit else 0))
    if size < 1:
        raise ValueError(f"expected a size above zero, got {text!r}")
    return size


def write_failure(error: Exception, out: Path) -> OSError | None:
    """Converts an error of storage, such as a full disk, to a short OSError.

    Args:
      error: an error of the OS or of a storage library.
      out: the output directory.

    Returns:
      The error, which says what is left on disk; None if `error` has another cause.
    """
    failure = None if isinstance(error, UserError) else storage_failure(error)
    if failure is None:
        return None
    what = "; ".join(getattr(error, "__notes__", [f"nothing was left at {out}"]))
    file = getattr(error, "filename", None)
    where = "" if file is None else f" ({clip(str(file))})"
    return OSError(f"{failure}{where}; {what}")


def _check_leftover(partial: Path) -> None:
    """Raises UserError unless a conversion left this directory."""
    ours = partial.is_dir() and not partial.is_symlink()
    if not ours or (any(partial.iterdir()) and not (partial / STAGING).exists()):
        raise UserError(f"{partial} is in the way, and no conversion left it; move it elsewhere")


def _check_target(out: Path, not_ours: Callable[[Path], str | None] | None) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} exists and is not a directory; choose another output")
    if not any(out.iterdir()):
        return
    if not_ours is None:
        raise UserError(f"{out} exists and is not empty; choose another output or --overwrite it")
    if (why := not_ours(out)) is not None:
        raise UserError(
            f"{out} is not something --overwrite may replace: it {why}; choose another output"
        )


def _check_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise UserError(
            f"not enough space in {directory}: {nbytes} bytes ({human_bytes(nbytes)}) may be"
            f" needed, {free} bytes ({human_bytes(free)}) are free"
        )


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    """Locks a directory; raises UserError if another process holds the lock."""
    try:
        lock_directory(directory, stack)
    except BlockingIOError as error:
        raise UserError(f"{directory} is being written by another run; wait for its end") from error


def _publish(partial: Path, out: Path, not_ours: Callable[[Path], str | None] | None) -> None:
    """Renames the finished directory to `out`, and removes an old `out`."""
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists():
        if replaced.exists():  # left by a run that was killed between its two renames
            if not_ours is None or not_ours(replaced) is not None:
                raise UserError(f"{replaced} is in the way, and no conversion left it; move it")
            shutil.rmtree(replaced)
        _check_target(out, not_ours)  # it may have changed meanwhile
        out.rename(replaced)
    try:
        partial.rename(out)
    except OSError:
        if replaced.exists():
            replaced.rename(out)
        raise
    (out / STAGING).unlink()
    if replaced.exists():
        shutil.rmtree(replaced)
