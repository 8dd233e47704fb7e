"""ArrayRecord files; each record is a row in JSON."""

import pathlib
from typing import Any

from vl2jax.common.errors import UserError, clip, reason
from vl2jax.common.paths import AnyPath
from vl2jax.data.file_source import FileSource
from vl2jax.data.json_files import parse_row


class ArrayRecordFile(FileSource):
    """Rows of an ArrayRecord file."""

    def __init__(self, path: pathlib.Path, root: AnyPath):
        """
        Args:
          path: the file.
          root: folder of relative image paths.

        Raises:
          UserError: the file is not an ArrayRecord file.
        """
        import grain  # slow to import, and other kinds of files do not need it

        super().__init__(path, root)
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource(str(path))
        except Exception as error:  # the reader raises exceptions of several types
            raise UserError(
                f"{clip(str(path))}: not an ArrayRecord file ({reason(error)}); write it again"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def content(self, index: int) -> bytes:
        try:
            return self._record(index)
        except UserError:
            return b""

    def _value(self, index: int) -> Any:
        return parse_row(self._record(index))

    def _record(self, index: int) -> bytes:
        try:
            return self._records[index]
        except Exception as error:  # the reader raises exceptions of several types
            raise UserError(f"damaged record ({reason(error)}); write it again") from error
