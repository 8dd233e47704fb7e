"""Data files as sources of rows: JSON, JSON lines, Parquet and ArrayRecord, one file or several.

Several threads read a source at once, and it is pickled for worker processes.  So a source opens
its file at each read, and has only attributes that can be pickled.
"""

import array
import bisect
import functools
import itertools
import json
import operator
import os
import pathlib
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vl2jax.common.errors import UserError
from vl2jax.common.paths import local_path
from vl2jax.data.formats import read_row
from vl2jax.data.patterns import matches
from vl2jax.data.row import Row, Source

# Parquet row groups in the cache of a file; rows of the same group are read from disk together.
CACHED_GROUPS = 4


def open_source(path: str | os.PathLike, *, images_root: str | os.PathLike | None = None) -> Source:
    """Opens a data file, all data files of a folder, or all files that match a pattern.

    - `.json`: a list of rows, or an object with the list under `data`; kept in memory.
    - `.jsonl`: one row per line, blank lines are skipped; only the line offsets are kept in memory.
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
        or pyarrow is not installed.  A malformed row raises it when it is read.
    """
    sources = []
    root_of_all = None if images_root is None else local_path(images_root, "images_root")
    for file in _find(str(local_path(path, "data"))):
        root = file.parent if root_of_all is None else root_of_all
        kind = _opener(file)
        assert kind is not None  # `_find` returns only files of known kinds
        source = kind(file, root)
        if not len(source):
            raise UserError(f"{file}: no rows; expected at least one")
        sources.append(source)
    return sources[0] if len(sources) == 1 else _Joined(sources)


class _Json:
    """Rows of a JSON file, which is parsed when it is opened."""

    def __init__(self, path: pathlib.Path, root: pathlib.Path):
        self._path, self._root = path, root
        rows = _parse_json(path.read_bytes(), path)
        if isinstance(rows, dict) and isinstance(rows.get("data"), list):
            rows = rows["data"]
        if not isinstance(rows, list):
            got = f"the keys {sorted(rows)[:8]}" if isinstance(rows, dict) else type(rows).__name__
            raise UserError(
                f"{path}: expected a list of rows, or {{'data': [...]}}, got {got}; put the rows"
                " into a list, or one on each line of a .jsonl file"
            )
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        index = _checked(index, self)
        where = f"{self._path} row {index + 1}"
        return read_row(self._rows[index], where=where, root=self._root)


class _JsonLines:
    """Rows of a JSON lines file; each line is read and parsed on access."""

    def __init__(self, path: pathlib.Path, root: pathlib.Path):
        self._path, self._root = path, root
        self._starts, self._numbers = array.array("q"), array.array("q")
        start = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        index = _checked(index, self)
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        where = f"{self._path}:{self._numbers[index]}"
        return read_row(_parse_row(line, where), where=where, root=self._root)


class _Parquet:
    """Rows of a Parquet file, with a cache of row groups."""

    def __init__(self, path: pathlib.Path, root: pathlib.Path):
        self._path, self._root = path, root
        self._lock = threading.Lock()
        self._group = functools.lru_cache(CACHED_GROUPS)(self._read_group)
        parquet, arrow = _pyarrow(path)
        try:
            with parquet.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        except arrow.ArrowException as error:
            raise UserError(f"{path}: not a parquet file ({error}); write it again") from error

    def __reduce__(self):
        return type(self), (self._path, self._root)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        index = _checked(index, self)
        where = f"{self._path} row {index + 1}"
        group = bisect.bisect_right(self._ends, index)
        with self._lock:  # so that threads do not read the same group several times
            table = self._group(group, where)
        row = table.slice(index - self._ends[group] + table.num_rows, 1).to_pylist()[0]
        return read_row(row, where=where, root=self._root)

    def _read_group(self, group: int, where: str) -> Any:
        parquet, arrow = _pyarrow(self._path)
        try:
            with parquet.ParquetFile(self._path) as file:
                return file.read_row_group(group)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{where}: damaged parquet data ({error}); write it again") from error


class _ArrayRecord:
    """Rows of an ArrayRecord file; each record is a row in JSON."""

    def __init__(self, path: pathlib.Path, root: pathlib.Path):
        import grain  # slow to import, and other kinds of files do not need it

        self._path, self._root = path, root
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource(str(path))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path}: not an ArrayRecord file ({error}); write it again") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        index = _checked(index, self)
        where = f"{self._path} row {index + 1}"
        try:
            record = self._records[index]
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{where}: damaged record ({error}); write it again") from error
        return read_row(_parse_row(record, where), where=where, root=self._root)


class _Joined:
    """Concatenation of sources."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        index = _checked(index, self)
        part = bisect.bisect_right(self._ends, index)
        source = self._sources[part]
        return source[index - self._ends[part] + len(source)]


_OPENERS: tuple[tuple[str, Callable[[pathlib.Path, pathlib.Path], Source]], ...] = (
    (r"\.json", _Json),
    (r"\.jsonl", _JsonLines),
    (r"\.parquet", _Parquet),
    (r"\.array_?record(-\d+-of-\d+)?", _ArrayRecord),
)
_KINDS = ".json, .jsonl, .parquet and .array_record"


def _opener(path: pathlib.Path) -> Callable[[pathlib.Path, pathlib.Path], Source] | None:
    """The class that opens a file, by its extension; None if it is unknown."""
    return next((kind for end, kind in _OPENERS if re.search(f"{end}$", path.name)), None)


def _find(path: str) -> list[pathlib.Path]:
    """Sorted data files of a path or glob pattern."""
    if os.path.isdir(path):
        found = [
            file
            for file in pathlib.Path(path).iterdir()
            if not file.name.startswith(".") and _opener(file) and file.is_file()
        ]
        if not found:
            raise UserError(f"{path}: no data file in this folder; {_KINDS} are read")
        return sorted(found)
    files = [file for file in matches(path) if os.path.isfile(file) or file == path]
    if not files:
        raise UserError(f"{path}: no such file; expected a data file, a folder or a pattern")
    for file in files:
        if not _opener(pathlib.Path(file)):
            raise UserError(f"{file}: unknown kind of data file; {_KINDS} are read, rename it")
    return [pathlib.Path(file) for file in files]


def _parse_json(text: bytes, path: pathlib.Path) -> Any:
    """Parses a JSON file; errors name the line and column."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {_not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        advice = "rename it to .jsonl if it has one row per line" if lines else "correct it there"
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); {advice}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write it again") from error


def _parse_row(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {_not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); expected one whole"
            " JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long or nesting too deep
        raise UserError(f"{where}: not valid JSON ({error}); expected a JSON object") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at offset {error.start}); save the file as UTF-8"


def _checked(index: int, source: Source) -> int:
    """Index from 0; negative indices count from the end, as for a list."""
    place, count = operator.index(index), len(source)
    if not -count <= place < count:
        raise IndexError(f"row {place} of a source with {count} rows")
    return place % count


def _pyarrow(path: pathlib.Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading parquet needs pyarrow, which is not installed:"
            " pip install 'vl2jax[parquet]'"
        ) from error
    return pyarrow.parquet, pyarrow
