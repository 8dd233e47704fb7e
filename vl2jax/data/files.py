"""Data files as sources of rows: JSON, JSON lines, Parquet and ArrayRecord, one file or several."""

import bisect
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from vl2jax.common.errors import UserError, clip
from vl2jax.common.paths import AnyPath, is_remote, user_path
from vl2jax.common.storage import file_system, local_copy, storage_errors
from vl2jax.data.array_record_file import ArrayRecordFile
from vl2jax.data.file_source import FileSource
from vl2jax.data.json_files import JsonFile
from vl2jax.data.parquet_file import ParquetFile
from vl2jax.data.patterns import matches
from vl2jax.data.row import Row, Source, row_place


def open_source(path: str | os.PathLike, *, images_root: str | os.PathLike | None = None) -> Source:
    """Opens a data file, all data files of a folder, or all files that match a pattern.

    - `.json`, `.jsonl`: a list of rows, an object with such a list (under `data`, for example), or
      one row per line, whatever the name says; see `json_files.py`.  May be compressed (`.gz`,
      `.bz2`, `.xz`, `.zst`) or in UTF-16; then it is copied to the folder of temporary files.  Rows
      on lines are not kept in memory, a list is.
    - `.parquet`: read one row group at a time; needs pyarrow.  An image is a record with `bytes`.
      Shuffled reading reads a whole group for each row, so write small groups (100 rows).
    - `.array_record`, also `.array_record-00000-of-00010`: each record is a row in JSON (UTF-8),
      with images as paths, `data:` URLs or `{"bytes": "<base64>"}`.

    Several files are concatenated, sorted by name.  Hidden files in a folder are passed over, such
    as the `._a.json` that macOS leaves.

    Args:
      path: a file, a folder or a glob pattern.
      images_root: folder of relative image paths; None: the folder of each data file.

    Raises:
      UserError: a file does not exist, has an unknown extension, has no rows or cannot be parsed,
        or a package that reads it is not installed.  A malformed row raises it when it is read.
    """
    given = user_path(path, "data")
    root_of_all = None if images_root is None else user_path(images_root, "images_root")
    sources = []
    for file in _find_remote(given) if is_remote(given) else _find(str(given)):
        kind = _opener(PurePath(file))
        assert kind is not None  # `_find` returns only files of known kinds
        local = file if isinstance(file, pathlib.Path) else local_copy(file)
        sources.append(_opened(kind, local, root_of_all or file.parent))
    return sources[0] if len(sources) == 1 else _Joined(sources)


def open_rows(path: pathlib.Path) -> FileSource:
    """Opens a file of requests: a data file, or a JSON text of any name, such as a pipe.

    Args:
      path: the file.

    Raises:
      UserError: as for `open_source`.
    """
    return _opened(_opener(path) or _JSON_LINES, path, path.parent)


class _Joined:
    """Concatenation of sources."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        place = row_place(index, len(self))
        part = bisect.bisect_right(self._ends, place)
        source = self._sources[part]
        return source[place - self._ends[part] + len(source)]


_Opener = Callable[[pathlib.Path, AnyPath], FileSource]
_JSON_LINES: _Opener = functools.partial(JsonFile, lines=True)
_COMPRESSED = r"(\.(gz|bz2|xz|zst))?"
_OPENERS: tuple[tuple[str, _Opener], ...] = (
    (rf"\.json{_COMPRESSED}", JsonFile),
    (rf"\.(jsonl|ndjson){_COMPRESSED}", _JSON_LINES),
    (r"\.parquet", ParquetFile),
    (r"\.array_?record(-\d+-of-\d+)?", ArrayRecordFile),
)
_KINDS = ".json, .jsonl (also .gz, .bz2, .xz, .zst), .parquet and .array_record"


def _opened(kind: _Opener, path: pathlib.Path, root: AnyPath) -> FileSource:
    source = kind(path, root)
    if not len(source):
        raise UserError(f"{clip(str(path))}: no rows; expected at least one")
    return source


def _opener(path: PurePath) -> _Opener | None:
    """What opens a file, by its extension; None if it is unknown."""
    found = (kind for end, kind in _OPENERS if re.search(f"{end}$", path.name, re.IGNORECASE))
    return next(found, None)


def _find_remote(path: AnyPath) -> list[AnyPath]:
    """Sorted data files of a path or glob pattern on an object store."""
    store: Any = file_system(path)
    text = str(path)
    with storage_errors(path):
        if store.isfile(text):
            names = [text]
        elif store.isdir(text):
            names = [name for name in store.ls(text, detail=False) if _opener(PurePath(name))]
        else:
            names = [name for name in store.glob(text) if store.isfile(name)]
    names = [name for name in names if not PurePath(name).name.startswith(".")]
    if not names:
        raise UserError(f"{clip(text)}: no data file there; {_KINDS} are read")
    scheme = text.partition("://")[0]
    files = [user_path(f"{scheme}://{name.removeprefix(f'{scheme}://')}", "data") for name in names]
    for file in files:
        if _opener(PurePath(file)) is None:
            raise UserError(f"{clip(str(file))}: unknown kind of data file; {_KINDS} are read")
    return sorted(files, key=str)


def _find(path: str) -> list[pathlib.Path]:
    """Sorted data files of a path or glob pattern."""
    if os.path.isdir(path):
        found = [
            file
            for file in pathlib.Path(path).iterdir()
            if not file.name.startswith(".") and _opener(file) and file.is_file()
        ]
        if not found:
            raise UserError(f"{clip(path)}: no data file in this folder; {_KINDS} are read")
        return sorted(found)
    files = [file for file in matches(path) if os.path.isfile(file) or file == path]
    if not files:
        raise UserError(f"{clip(path)}: no such file; expected a data file, a folder or a pattern")
    for file in files:
        if not _opener(pathlib.Path(file)):
            raise UserError(
                f"{clip(file)}: unknown kind of data file; {_KINDS} are read, rename it"
            )
    return [pathlib.Path(file) for file in files]
