"""`FileSource`: the rows of one data file, for training and for `--batch`."""

import abc
import pathlib
from typing import Any

from vl2jax.common.errors import UserError, clip, reason
from vl2jax.common.paths import AnyPath
from vl2jax.data.formats import read_row
from vl2jax.data.row import Row, row_place


class FileSource(abc.ABC):
    """Rows of a data file; each kind of file is a subclass, which says how a row is parsed.

    Several threads read a source at once, and it is pickled for worker processes.  So a source
    opens its file at each read, and has only attributes that can be pickled.

    Attributes:
      path: the file.
      root: folder of relative image paths.
    """

    def __init__(self, path: pathlib.Path, root: AnyPath):
        self.path, self.root = path, root

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _value(self, index: int) -> Any:
        """Parses row `index`, from 0; raises UserError without the name of the row."""

    def number(self, index: int) -> int:
        """Returns the number of row `index` in its file, from 1."""
        return index + 1

    def where(self, index: int) -> str:
        """Returns the name of row `index` in messages."""
        return f"{clip(str(self.path))} row {index + 1}"

    def value(self, index: int) -> Any:
        """Returns row `index`, from 0, as parsed.

        Raises:
          UserError: the row cannot be read; the message does not name it, see `where`.
        """
        try:
            return self._value(index)
        except OSError as error:
            raise UserError(f"cannot read the file ({reason(error)}); check its disk") from error

    def content(self, index: int) -> bytes:
        """Returns bytes by which row `index`, from 0, is recognised; b"" if it cannot be read."""
        try:
            return repr(self.value(index)).encode(errors="backslashreplace")
        except UserError:
            return b""

    def __getitem__(self, index: int) -> Row:
        place = row_place(index, len(self))
        where = self.where(place)
        try:
            value = self.value(place)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        return read_row(value, where=where, root=self.root, file=str(self.path))
