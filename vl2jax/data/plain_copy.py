"""Text files as UTF-8 on disk: copies of files that are compressed, in UTF-16, or a pipe.

Rows have random access, so such a file is read once and copied to the folder of temporary files.
"""

import bz2
import codecs
import contextlib
import gzip
import importlib
import json
import lzma
import os
import pathlib
import stat
import tempfile
import weakref
from collections.abc import Callable
from typing import IO, Any, NoReturn

from vl2jax.common.errors import UserError, clip, is_disk_full, reason

_BLOCK = 1 << 20  # bytes that are copied at a time


def plain_copy(path: pathlib.Path, owner: Any) -> pathlib.Path:
    """Returns a regular file with the text of a file as UTF-8.

    Args:
      path: a file, which may be compressed (gzip, bzip2, xz, zstd), in UTF-16 or UTF-32, or a pipe;
        what it is is seen by its first bytes.
      owner: the copy, if one is needed, is removed with this object.

    Returns:
      The file itself if it is plain; it may have a byte order mark.

    Raises:
      UserError: the file cannot be read or decoded, there is no room for the copy, or a package
        that decompresses it is not installed.
    """
    name = clip(str(path))
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
        if is_file:
            with path.open("rb") as file:
                start = file.read(8)
            if _decompressor(start) is None and _encoding(start) == "utf-8":
                return path
        with path.open("rb") as file:
            return _copy(file, name, owner)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"{name}: no room in {tempfile.gettempdir()} for the plain copy of this file; set"
                " TMPDIR to another folder, or decompress it yourself"
            ) from error
        raise UserError(f"{name}: cannot read the file ({reason(error)})") from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _copy(file: IO[bytes], name: str, owner: Any) -> pathlib.Path:
    """Copies an open file to a temporary one, decompressed and as UTF-8."""
    blocks = _Blocks(file)
    opener = _decompressor(blocks.peek(8))
    opened: Any = blocks if opener is None else _Blocks(opener(blocks))
    encoding = _encoding(opened.peek(8))
    decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
    with tempfile.NamedTemporaryFile(prefix="vl2jax-", suffix=".txt", delete=False) as copy:
        weakref.finalize(owner, _remove, copy.name, os.getpid())
        try:
            while block := opened.read(_BLOCK):
                copy.write(block if decoder is None else decoder.decode(block).encode())
            if decoder is not None:
                decoder.decode(b"", final=True)
        except UnicodeError as error:
            raise UserError(f"not {encoding} ({reason(error)}); save the file as UTF-8") from error
        except Exception as error:
            _raise_for(error)
    return pathlib.Path(copy.name)


class _Blocks:
    """A readable file whose first bytes can be looked at."""

    def __init__(self, file: Any):
        self._file, self._start = file, b""

    def peek(self, count: int) -> bytes:
        try:
            while len(self._start) < count and (more := self._file.read(count)):
                self._start += more
        except Exception as error:
            _raise_for(error)
        return self._start[:count]

    def read(self, count: int = -1) -> bytes:
        if not self._start:
            return self._file.read(count)
        cut = len(self._start) if count < 0 else count
        block, self._start = self._start[:cut], self._start[cut:]
        return block + (self._file.read() if count < 0 else b"")


def _decompressor(start: bytes) -> Callable[[Any], Any] | None:
    """What opens a compressed file, by its first bytes; None if it is not compressed."""
    for magic, opener in (
        (b"\x1f\x8b", gzip.open),
        (b"BZh", bz2.open),
        (b"\xfd7zXZ\0", lzma.open),
        (b"\x28\xb5\x2f\xfd", _zstd),
    ):
        if start.startswith(magic):
            return opener
    return None


def _zstd(file: Any) -> Any:
    """Opens a zstd file, by the standard library (Python 3.14) or by `zstandard`."""
    with contextlib.suppress(ImportError):
        return importlib.import_module("compression.zstd").open(file, "rb")
    try:
        return _ZstdFile(file, importlib.import_module("zstandard"))
    except ImportError as error:
        raise UserError(
            "reading .zst needs zstandard, which is not installed: pip install 'vl2jax[zstd]'"
        ) from error


class _ZstdFile:
    """Reads all frames of a zstd file; unlike `zstandard.open`, it notices a file that is cut."""

    def __init__(self, file: Any, zstandard: Any):
        self._file, self._new = file, zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._begun = False

    def read(self, count: int = _BLOCK) -> bytes:
        while True:
            block = self._frame.unused_data if self._frame.eof else self._file.read(count)
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
                block = block or self._file.read(count)
            if not block:
                if self._begun:
                    raise EOFError("the last frame is cut off")
                return b""
            self._begun = True
            if text := self._frame.decompress(block):
                return text


def _raise_for(error: Exception) -> NoReturn:
    """Raises UserError for damaged data; decompressors raise exceptions of many types."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno is not None):
        raise error
    raise UserError(f"damaged compressed file ({reason(error)}); get it again") from error


def _encoding(start: bytes) -> str:
    """Encoding of a JSON text, by its byte order mark or the zeros in its first characters."""
    found = json.detect_encoding(start[:4])
    return "utf-8" if found in ("utf-8", "utf-8-sig") else found


def _remove(name: str, process: int) -> None:
    if os.getpid() == process:  # not in a forked worker process
        pathlib.Path(name).unlink(missing_ok=True)
