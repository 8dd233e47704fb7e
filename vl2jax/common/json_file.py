"""Reads JSON files that others wrote: bounded, strict, and with errors that name the cause."""

import json
import math
from pathlib import Path
from typing import Any

from vl2jax.common.errors import UserError, shown

LIMIT = 16 * 2**20  # bytes of a file of settings

# What a file that was not downloaded properly has at its beginning.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGES = (b"<!doctype html", b"<html")
HEAD = 64  # bytes of the beginning that `not_downloaded` needs


def not_downloaded(head: bytes) -> str | None:
    """Says what a file is that stands in the place of the real one; None: nothing is known.

    Args:
      head: the first `HEAD` bytes of the file.
    """
    if head.startswith(_LFS_POINTER):
        return "a Git LFS pointer, not the file itself; run `git lfs pull`, or download it again"
    if head.lstrip().lower().startswith(_WEB_PAGES):
        return "a web page, not the file itself; download it again"
    return None


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """Reads a whole file.

    Args:
      path: the file.
      limit: maximum number of bytes.

    Raises:
      UserError: it cannot be read, is too large, or stands in the place of another file.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if (instead := not_downloaded(content[:HEAD])) is not None:
        raise UserError(f"{path}: {instead}")
    if len(content) > limit:
        raise UserError(f"{path}: is larger than {limit} bytes, which no such file is")
    return content


def parse_object(content: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    NaN, infinite numbers, duplicate keys and unpaired surrogates are refused: different programs
    read them differently.

    Args:
      content: UTF-8, with or without a byte order mark.

    Raises:
      ValueError: it is not such an object; the message is one short line.
    """
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        if "\\u" in text:  # only escapes can make unpaired surrogates
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text is not valid Unicode (an unpaired surrogate)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {error.lineno}, column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object {{...}}, got {shown(value)}")
    return value


def read_object(path: Path, limit: int = LIMIT, *, required: bool = True) -> dict[str, Any]:
    """Reads a file with a JSON object.

    Args:
      path: the file.
      limit: maximum number of bytes.
      required: whether a missing file is an error; otherwise it is read as {}.

    Raises:
      UserError: see `read_bytes`, or it is not a JSON object.
    """
    if not required and not path.exists():
        return {}
    return object_in(path, read_bytes(path, limit))


def object_in(path: Path, content: bytes) -> dict[str, Any]:
    """Parses the content of a file, see `parse_object`; the UserError names the file."""
    try:
        return parse_object(content)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); take it from the checkpoint") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _whole(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"the number {shown(text)} is too large")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {shown(text)} is too large")
    return number
