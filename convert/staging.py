"""What both conversions share: output that appears only when whole, and errors on one line."""

import collections
import concurrent.futures
import contextlib
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from convert.stopping import Interrupted
from vl2jax.cli.command import run_cli
from vl2jax.common.errors import UserError, is_disk_full
from vl2jax.common.file_lock import lock_directory
from vl2jax.common.progress import human_bytes

_NOTHING_LEFT = "nothing was left behind; run it again"
_REMOVAL_SECONDS, _SETTLE_SECONDS = 5.0, 0.2
_THREADS = 2  # each holds a piece of at most mapping.PIECE_BYTES, and copies of it


@contextlib.contextmanager
def staged_directory(
    out: Path, nbytes: int, is_ours: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Gives a directory to fill, and renames it to `out` when the block ends well.

    The work is done in `OUT.partial` beside it, which is removed when the block fails; a note on
    the error says if that was not possible.  What a killed run left there is removed by the next.

    Args:
      out: the directory to make.
      nbytes: how much will be written, at most; less free space is an error before any work.
      is_ours: whether an existing `out` may be replaced; None never replaces.

    Raises:
      UserError: `out` is in the way, another run writes there, or the disk is too small.
    """
    out = Path(os.path.abspath(out))
    _check_target(out, is_ours)
    partial = out.with_name(out.name + ".partial")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_made_parents(out))
        if partial.exists():
            _lock(partial, stack)  # held by a living run, or else stale
            shutil.rmtree(partial)
        _check_space(out.parent, nbytes)
        partial.mkdir()
        _lock(partial, stack)
        try:
            yield partial
            _publish(partial, out)
        except BaseException as error:
            if (left := _remove(partial)) is not None:
                error.add_note(left)
            raise


@contextlib.contextmanager
def _made_parents(path: Path) -> Iterator[None]:
    """Makes the directories above a path, and removes those that it made if the block fails."""
    made = [parent for parent in path.parents if not parent.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # someone else uses it by now
            for parent in made:
                parent.rmdir()
        raise


def _remove(directory: Path) -> str | None:
    """Removes a directory for good; says what is left where that fails.

    A storage library may end a write or two after the error that it raised, and so make a directory
    anew: it has to stay away for a moment.
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
    """Runs the command line of a conversion; the exit code, as `run_cli` gives it.

    Conversion needs no accelerator, and must not take one that a training run may hold: JAX, which
    is imported by now and no longer reads the environment, is told to use the CPU unless the user
    chose a platform.
    """
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    return run_cli(lambda: _until_interrupted(main), interrupted=f"interrupted: {_NOTHING_LEFT}")


def _until_interrupted(main: Callable[[], None]) -> int:
    """Runs `main`; after a signal says what is left behind."""
    try:
        main()
        return 0
    except Interrupted as error:
        what = "; ".join(getattr(error, "__notes__", [_NOTHING_LEFT]))
        print(f"\ninterrupted: {what}", file=sys.stderr, flush=True)
        if error.still_running:  # the end of Python would wait for its threads
            os._exit(error.exit_code)
        return error.exit_code


def map_ahead(function: Callable, items: Iterable) -> Iterator:
    """`map`, working on the next few items in threads while the caller uses this one."""
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
    """Reads a size such as `5GB`, `500MB` or `1.5GiB`.

    Raises:
      ValueError: it is not one.
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


def disk_full(error: Exception, out: Path) -> OSError | None:
    """The plain error for a storage error that means a full disk; None for any other."""
    if not is_disk_full(error):
        return None
    what = "; ".join(getattr(error, "__notes__", [f"nothing was left at {out}"]))
    return OSError(errno.ENOSPC, f"the disk is full; {what}")


def _check_target(out: Path, is_ours: Callable[[Path], bool] | None) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UserError(f"{out} exists and is not a directory; choose another output")
    if not any(out.iterdir()):
        return
    if is_ours is None:
        raise UserError(f"{out} exists and is not empty; choose another output or --overwrite it")
    if not is_ours(out):
        raise UserError(f"{out} is not something --overwrite may replace; choose another output")


def _check_space(directory: Path, nbytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if nbytes > free:
        raise UserError(
            f"not enough space in {directory}: {nbytes} bytes ({human_bytes(nbytes)}) may be"
            f" needed, {free} bytes ({human_bytes(free)}) are free"
        )


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    """Takes the directory for this process."""
    try:
        lock_directory(directory, stack)
    except BlockingIOError as error:
        raise UserError(f"{directory} is being written by another run; wait for its end") from error


def _publish(partial: Path, out: Path) -> None:
    """Renames the finished directory into place, over an old one if need be."""
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists():
        if replaced.exists():  # left by a run that died between its two renames
            shutil.rmtree(replaced)
        out.rename(replaced)
    try:
        partial.rename(out)
    except OSError:
        if replaced.exists():
            replaced.rename(out)
        raise
    if replaced.exists():
        shutil.rmtree(replaced)
