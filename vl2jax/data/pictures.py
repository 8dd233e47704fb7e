"""Image sources in rows of data files: paths, URLs, bytes, or records with one of these."""

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from vl2jax.common.errors import UserError, clip, named, shown
from vl2jax.common.paths import AnyPath, has_scheme, is_remote, user_path
from vl2jax.processing.image_source import (
    ImageSource,
    cannot_open,
    check_local,
    decode_base64,
)

_FORMS = "a path, a file:// or data: URL, or {'bytes': ...}"
_BYTES = ("bytes", "base64", "data")  # keys of records whose text is base64
_KEYS = (*_BYTES, "path", "url", "image_url", "image", "source")


def picture(value: Any, folders: Sequence[AnyPath]) -> ImageSource:
    """Converts an image of a row to a source for `image.load_image`; checks that the file exists.

    Args:
      value: a path, a URL, bytes, a PIL image, or a record of one of these under `bytes` (base64 if
        it is a text), `base64`, `data`, `path`, `url`, `image_url`, `image` or `source`; the first
        of these keys that is not empty is used.
      folders: folders of relative paths; the first that has the file is used.

    Raises:
      UserError: the value is none of these, the file does not exist or is empty, `bytes` is not
        valid base64, or the image is on another host.
    """
    if isinstance(value, Mapping):
        key = next((key for key in _KEYS if value.get(key) not in (None, "", b"")), None)
        if key is None:
            if b"" in [value.get(key) for key in _BYTES]:
                raise UserError("no bytes; expected the content of an image file")
            raise UserError(f"expected {_FORMS}, got the keys {named(value)}")
        found = value[key]
        if key in _BYTES:
            return _bytes(found)
        return picture(found, folders)
    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, bytes):
        return _bytes(value)
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UserError(f"expected {_FORMS}, got {shown(value)}")
    if isinstance(value, str):
        value = value.strip() or value
        check_local(value)
        if value[:5].lower() == "data:":
            return _bytes(value)
        if value[:5].lower() == "file:":
            return value
        if has_scheme(value):
            return str(user_path(value, "the picture"))
    return _existing(value, folders)


def is_absent(value: Any) -> bool:
    """Returns whether a row says with this value that it has no image: null, "" or empty records.

    Args:
      value: an image of a row, as for `picture`.
    """
    if isinstance(value, Mapping):
        return all(inner is None or inner == "" for inner in value.values())
    return value is None or (isinstance(value, str) and not value.strip())


def _bytes(value: Any) -> bytes:
    """The content of a file: bytes, base64, or a list of integers."""
    if isinstance(value, str):
        value = decode_base64(value)
    if isinstance(value, list) and all(type(x) is int and 0 <= x < 256 for x in value):
        value = bytes(value)
    if not isinstance(value, bytes):
        raise UserError(f"'bytes' must be bytes or a base64 text, got {shown(value)}")
    if not value:
        raise UserError("no bytes; expected the content of an image file")
    return value


def _existing(value: str | os.PathLike, folders: Sequence[AnyPath]) -> str:
    failed: Exception | None = None
    for folder in folders:
        path = folder / value
        if is_remote(path):
            return str(path)
        try:
            found = os.stat(path)
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            failed = failed or error
            continue
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{clip(str(path))}: not a file; expected the path of an image file")
        if not found.st_size:
            raise UserError(f"{clip(str(path))}: the picture is empty (0 bytes); get it again")
        return str(path)
    assert failed is not None  # there is at least one folder
    advice = "relative paths begin at the data file's folder or at images_root: correct one of them"
    raise UserError(cannot_open(str(folders[0] / value), failed, advice)) from failed
