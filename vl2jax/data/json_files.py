"""JSON files: a list of rows, rows on lines, or a single row; the content decides which.

A file is read by lines if its first line is a whole row and other lines follow.  Otherwise it is
parsed as one JSON text.
"""

import array
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vl2jax.common.errors import UserError, clip, named, reason
from vl2jax.common.json_file import not_downloaded
from vl2jax.common.paths import AnyPath
from vl2jax.data.file_source import FileSource
from vl2jax.data.keys import ROLE_KEYS, ROW_KEYS
from vl2jax.data.plain_copy import plain_copy

# A file named as one of lines whose first line is malformed is parsed as a whole only up to this
# size, in bytes.
_WHOLE = 1 << 28
_LOOKED_AT = 100  # lines in which rows are looked for
_MARK = b"\xef\xbb\xbf"  # byte order mark of UTF-8
_NOTHING = object()


class JsonFile(FileSource):
    """Rows of a JSON text, in memory; or of lines, of which only the offsets are in memory."""

    def __init__(self, path: pathlib.Path, root: AnyPath, *, lines: bool = False):
        """
        Args:
          path: the file; it may be compressed, in UTF-16, or a pipe.
          root: folder of relative image paths.
          lines: whether the name of the file says that it has one row per line.

        Raises:
          UserError: the file cannot be read, or is not JSON.
        """
        super().__init__(path, root)
        self._plain = plain_copy(path, self)
        self._rows: list[Any] | None = None
        self._starts, self._numbers = array.array("q"), array.array("q")
        try:
            self._open(lines)
        except UserError as error:
            raise UserError(f"{clip(str(path))}{error}") from error
        except OSError as error:
            raise UserError(f"{clip(str(path))}: cannot read the file ({reason(error)})") from error

    def __len__(self) -> int:
        return len(self._starts) if self._rows is None else len(self._rows)

    def number(self, index: int) -> int:
        return index + 1 if self._rows is not None else self._numbers[index]

    def where(self, index: int) -> str:
        if self._rows is not None:
            return super().where(index)
        return f"{clip(str(self.path))}:{self._numbers[index]}"

    def content(self, index: int) -> bytes:
        if self._rows is not None:
            return json.dumps(self._rows[index]).encode()
        try:
            return self._line(index).strip()
        except OSError:
            return b""

    def _value(self, index: int) -> Any:
        if self._rows is not None:
            return self._rows[index]
        return parse_row(self._line(index))

    def _line(self, index: int) -> bytes:
        with self._plain.open("rb") as file:
            file.seek(self._starts[index])
            return file.readline()

    def _open(self, lines: bool) -> None:
        """Decides whether the file has one row per line, and finds its rows."""
        first, more = _first_line(self._plain)
        if found := not_downloaded(first):
            raise UserError(f": {found}")
        value = _parsed(first)
        if value is not _NOTHING and not more:
            rows = _rows_of(value)
            if rows is None or rows != [value]:
                self._rows = _checked_rows(value, rows)
                return
        elif value is _NOTHING and not (
            lines and (not first or self._plain.stat().st_size > _WHOLE)
        ):
            try:
                value = _parse_text(self._plain.read_bytes())
            except UserError:
                if not (lines and _has_rows(self._plain)):
                    raise
            else:
                self._rows = _checked_rows(value, _rows_of(value))
                return
        self._find_lines()

    def _find_lines(self) -> None:
        start = 0
        with self._plain.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace() and (number > 1 or line.strip() != _MARK):
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)


def parse_row(text: bytes) -> Any:
    """Parses a row in JSON (UTF-8).

    Raises:
      UserError: the text is not valid JSON.
    """
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(error)) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"not valid JSON ({error.msg} at column {error.colno}); expected one whole JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number too long or nesting too deep
        raise UserError(f"not valid JSON ({reason(error)}); expected a JSON object") from error


def _first_line(path: pathlib.Path) -> tuple[bytes, bool]:
    """The first line that is not blank, and whether another one follows."""
    lines = _lines(path)
    return next(lines, b""), next(lines, None) is not None


def _lines(path: pathlib.Path) -> Iterator[bytes]:
    """Lines that are not blank, without a byte order mark."""
    with path.open("rb") as file:
        for line in file:
            if line := line.removeprefix(_MARK).strip():
                yield line


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):
        return _NOTHING


def _has_rows(path: pathlib.Path) -> bool:
    """Whether one of the first lines is a row."""
    return any(is_row(_parsed(line)) for line in itertools.islice(_lines(path), _LOOKED_AT))


def is_row(value: Any) -> bool:
    """Returns whether a parsed value looks like a row: it has a key of rows, or lists turns."""
    if isinstance(value, Mapping):
        return any(value.get(key) is not None for key in ROW_KEYS)
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_turn(value: Any) -> bool:
    return (
        isinstance(value, Mapping) and any(key in value for key in ROLE_KEYS) and not is_row(value)
    )


def _rows_of(value: Any) -> list[Any] | None:
    """The rows of a JSON text; None if it has no list of rows and is no row."""
    if isinstance(value, list):
        return [value] if is_row(value) else value
    if not isinstance(value, Mapping):
        return None
    lists = [
        inner
        for inner in value.values()
        if isinstance(inner, list) and any(map(is_row, inner)) and not is_row(inner)
    ]
    if len(lists) == 1:
        return lists[0]
    if not lists and is_row(value):
        return [value]
    return value["data"] if isinstance(value.get("data"), list) else None


def _checked_rows(value: Any, rows: list[Any] | None) -> list[Any]:
    if rows is None:
        got = f"the keys {named(value)}" if isinstance(value, Mapping) else type(value).__name__
        raise UserError(
            f": expected a list of rows, or {{'data': [...]}}, got {got}; put the rows into a list,"
            " or one on each line of a .jsonl file"
        )
    return rows


def _parse_text(text: bytes) -> Any:
    """Parses a JSON text; errors begin with the line."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise UserError(f":{line}: {_not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data"
        advice = "rename it to .jsonl if it has one row per line" if lines else "correct it there"
        raise UserError(
            f":{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); {advice}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f": not valid JSON ({reason(error)}); write it again") from error


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at offset {error.start}); save the file as UTF-8"
