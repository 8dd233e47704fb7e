"""Parquet files, with a cache of row groups."""

import bisect
import collections
import itertools
import pathlib
import threading
from typing import Any

from vl2jax.common.errors import UserError, clip, reason
from vl2jax.common.json_file import HEAD, not_downloaded
from vl2jax.common.paths import AnyPath
from vl2jax.data.file_source import FileSource

# Limits of the cache of a file; rows of the same group are read from disk together.
CACHED_GROUPS = 4
CACHED_BYTES = 1 << 30


class ParquetFile(FileSource):
    """Rows of a Parquet file."""

    def __init__(self, path: pathlib.Path, root: AnyPath):
        """
        Args:
          path: the file.
          root: folder of relative image paths.

        Raises:
          UserError: the file is not a Parquet file, or pyarrow is not installed.
        """
        super().__init__(path, root)
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        parquet, name = _pyarrow(path), clip(str(path))
        try:
            with path.open("rb") as file:
                start = file.read(HEAD)
            with parquet.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                counts = [group.num_rows for group in groups]
        except Exception as error:  # pyarrow raises exceptions of many types for damaged files
            if found := not_downloaded(start):
                raise UserError(f"{name}: {found}") from error
            raise UserError(
                f"{name}: not a parquet file ({reason(error)}); write it again"
            ) from error
        if min(counts, default=0) < 0:
            raise UserError(f"{name}: damaged parquet data (a group of rows); write it again")
        self._ends = list(itertools.accumulate(counts))

    def __reduce__(self):
        return type(self), (self.path, self.root)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _value(self, index: int) -> Any:
        group = bisect.bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        try:
            with self._lock:  # so that threads do not read the same group several times
                table = self._group(group)
            return table.slice(index - first, 1).to_pylist()[0]
        except Exception as error:  # pyarrow raises exceptions of many types for damaged files
            raise UserError(f"damaged parquet data ({reason(error)}); write it again") from error

    def _group(self, group: int) -> Any:
        """A group of rows as a table, from the cache or the file."""
        if group not in self._groups:
            with _pyarrow(self.path).ParquetFile(self.path) as file:
                self._groups[group] = file.read_row_group(group)
            while len(self._groups) > 1 and (
                len(self._groups) > CACHED_GROUPS
                or sum(table.nbytes for table in self._groups.values()) > CACHED_BYTES
            ):
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]


def _pyarrow(path: pathlib.Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{clip(str(path))}: reading parquet needs pyarrow, which is not installed:"
            " pip install 'vl2jax[parquet]'"
        ) from error
    return pyarrow.parquet
