"""Which checkpoints are complete.

The last file that is written into a checkpoint is `complete.json`.  It lists the files with their
sizes, and the small ones with their checksums; arrays have checksums in their chunks (see
`array_writer.py`).  So a checkpoint is known to be complete also on a storage that does not rename
directories atomically, and when it was copied.  A checkpoint that was written before this file
existed has arrays without checksums; it is judged by its structure.
"""

import functools
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vl2jax.common.atomic_file import write_json
from vl2jax.common.json_file import parse_object
from vl2jax.common.paths import AnyPath, is_remote
from vl2jax.common.storage import list_files, read_file

PARAMS, OPT_STATE, DATA = "params", "opt_state", "data"
CHECKPOINTS = "checkpoints"
MARKER = "complete.json"
NO_MARKER = f"{MARKER} is missing"
_CHECKED = 4 * 2**20  # larger files have no checksum here; their chunks have
_MANIFEST, _METADATA = "manifest.ocdbt", "_METADATA"  # names of Orbax


def seal(directory: Path) -> None:
    """Writes the marker of a checkpoint; call it after all other files are written.

    Raises:
      OSError: a file cannot be read or written.
    """
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(directory, followlinks=True)
        for name in names
    ]
    listed = {
        file.relative_to(directory).as_posix(): _describe(file)
        for file in sorted(files)
        if file != directory / MARKER and not file.name.startswith(".")
    }
    write_json(directory / MARKER, {"files": listed})


def defect(directory: AnyPath, parts: Sequence[str]) -> str | None:
    """Looks for what makes a checkpoint unusable; does not read large files.

    Args:
      directory: the checkpoint.
      parts: the parts that are needed, such as `PARAMS`.

    Returns:
      A short phrase, such as "opt_state is missing"; None if nothing was found.
    """
    try:
        if is_remote(directory):
            return _remote_defect(directory, parts)
        for part in parts:
            if not (directory / part).exists():
                return f"{part} is missing"
        if (directory / MARKER).exists():
            return _listed_defect(directory, parts, None)
        return _structural_defect(directory, parts)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def complete_steps(workdir: AnyPath, parts: Sequence[str] = (PARAMS,)) -> list[int]:
    """The complete checkpoints of a training workdir: their steps, in ascending order."""
    directory = workdir / CHECKPOINTS
    return [step for step in all_steps(workdir) if defect(directory / str(step), parts) is None]


def newest_complete(
    workdir: AnyPath, parts: Sequence[str]
) -> tuple[int | None, list[tuple[int, str]]]:
    """Finds the newest complete checkpoint.

    Returns:
      Its step, None if there is none; and the newer steps with their defects, newest first.
    """
    defects = []
    for step in reversed(all_steps(workdir)):
        found = defect(workdir / CHECKPOINTS / str(step), parts)
        if found is None:
            return step, defects
        defects.append((step, found))
    return None, defects


def all_steps(workdir: AnyPath) -> list[int]:
    """Steps of all checkpoints of a training workdir, complete or not, in ascending order."""
    directory = workdir / CHECKPOINTS
    return sorted(int(name) for name in entries(directory) if _is_step(name))


def entries(directory: AnyPath) -> set[str]:
    """Names of the files and folders in a directory."""
    if is_remote(directory):
        return {name.split("/")[0] for name in list_files(directory)}
    return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def describe_defects(workdir: AnyPath, defects: Sequence[tuple[int, str]]) -> str:
    """One line about checkpoints that are not complete."""
    shown = "; ".join(f"step {step}: {what}" for step, what in defects[:3])
    more = f"; and {len(defects) - 3} more" if len(defects) > 3 else ""
    return f"{workdir / CHECKPOINTS} has checkpoints that are not complete ({shown}{more})"


@functools.cache
def warn_once(message: str) -> None:
    """Prints a warning to standard error, once per process."""
    print(f"warning: {message}", file=sys.stderr)


def _describe(file: Path) -> list[int]:
    """Size of a file, and its checksum if it is small."""
    size = file.stat().st_size
    return [size, zlib.crc32(file.read_bytes())] if size <= _CHECKED else [size]


def _remote_defect(directory: AnyPath, parts: Sequence[str]) -> str | None:
    """Judges a checkpoint on an object store, where all have a marker."""
    sizes = list_files(directory)
    for part in parts:
        if not any(name == part or name.startswith(f"{part}/") for name in sizes):
            return f"{part} is missing"
    if MARKER not in sizes:
        return NO_MARKER
    return _listed_defect(directory, parts, sizes)


def read_bytes(file: AnyPath) -> bytes:
    """Reads a whole file, local or on an object store."""
    return read_file(file) if is_remote(file) else file.read_bytes()


def _listed_defect(
    directory: Any, parts: Sequence[str], sizes: Mapping[str, int] | None
) -> str | None:
    """Compares the files of a checkpoint with its marker; `sizes`: those of a listing."""
    try:
        files = parse_object(read_bytes(directory / MARKER))["files"]
        entries = [(str(name), *map(int, entry)) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is damaged"
    for part in parts:
        if not any(name == part or name.startswith(f"{part}/") for name, *_ in entries):
            return f"{MARKER} is damaged"
    for name, size, *checksum in entries:
        if name.split("/")[0] not in parts:
            continue
        found = _size(directory / name) if sizes is None else sizes.get(name)
        if found is None:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
        if checksum and zlib.crc32(read_bytes(directory / name)) != checksum[0]:
            return f"{name} is damaged"
    return None


def _size(file: Path) -> int | None:
    """Size of a file in bytes; None if there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_size


def _structural_defect(directory: AnyPath, parts: Sequence[str]) -> str | None:
    """Judges a checkpoint without a marker."""
    for part in parts:
        if part == DATA:
            if read_data_state(directory) is None:
                return f"{DATA} is damaged"
        elif not (directory / part / _MANIFEST).exists():
            return f"{part}/{_MANIFEST} is missing"
        elif _has_checksums(directory / part):
            return NO_MARKER
    return None


def _has_checksums(part: AnyPath) -> bool:
    """Whether arrays were written with checksums, which was always with a marker."""
    try:
        metadata = parse_object((part / _METADATA).read_bytes())
    except (OSError, ValueError):  # it is not needed to read the arrays
        return False
    return bool(metadata.get("use_zarr3"))


def read_data_state(directory: AnyPath) -> dict[str, Any] | None:
    """Reads the state of the data from a checkpoint; None if it is missing or damaged."""
    try:
        return parse_object(read_bytes(directory / DATA / "metadata"))
    except (OSError, ValueError):
        return None
