"""Image sources in rows of data files: paths, URLs, bytes, or records with one of these."""

import base64
import binascii
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any

import PIL.Image

from vl2jax.common.errors import UserError
from vl2jax.common.paths import has_scheme, user_path
from vl2jax.processing.image import URL_SCHEMES, ImageSource

_FORMS = "a path, a file:// or data: URL, or {'bytes': ...}"


def picture(value: Any, root: pathlib.Path) -> ImageSource:
    """Converts an image of a row to a source for `image.load_image`; checks that the file exists.

    Args:
      value: a path, a URL, bytes, a PIL image, or a mapping with `bytes` (base64 if it is a text),
        `path` or `url`; the first of these keys is used.
      root: folder of relative paths.

    Raises:
      UserError: the value is none of these, the file does not exist or is empty, or `bytes` is not
        valid base64.
    """
    if isinstance(value, Mapping):
        key = next((key for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if key is None:
            raise UserError(f"expected {_FORMS}, got the keys {sorted(map(str, value))[:8]}")
        value = value[key]
        if key == "bytes" and isinstance(value, str):
            value = _decode_base64(value)
    if isinstance(value, PIL.Image.Image):
        return value
    if isinstance(value, bytes):
        if not value:
            raise UserError("no bytes; expected the content of an image file")
        return value
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UserError(f"expected {_FORMS}, got {value!r:.80}")
    if isinstance(value, str) and value.lower().startswith(URL_SCHEMES):
        return value
    if isinstance(value, str) and has_scheme(value):
        return str(user_path(value, "the picture"))
    return _existing(root / value)


def _existing(path: pathlib.Path) -> str:
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{path}: cannot open the picture ({reason}); relative paths begin at the data file's"
            " folder or at images_root: correct one of them"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not a file; expected the path of an image file")
    if not found.st_size:
        raise UserError(f"{path}: the picture is empty (0 bytes); get it again")
    return str(path)


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"'bytes' is a text that is not valid base64 ({error})") from error
