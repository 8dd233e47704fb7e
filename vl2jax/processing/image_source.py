"""Opens image sources: paths, `file://` URLs, `data:` URLs, base64 and bytes."""

import base64
import binascii
import io
import os
import re
import struct
import urllib.parse
from typing import IO

import PIL.Image

from vl2jax.common.errors import UserError, clip, reason, shown
from vl2jax.common.paths import is_remote, user_path
from vl2jax.common.storage import read_file

ImageSource = str | os.PathLike | bytes | PIL.Image.Image

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
# Backslashes of texts that were escaped twice, with the letter of a line end or tab after them.
_ESCAPES = re.compile(r"\\[nrt]?")
_URLSAFE = str.maketrans("-_", "+/")


def open_source(source: str | os.PathLike | bytes) -> tuple[str, IO[bytes]]:
    """Opens the file or the bytes of an image.

    Args:
      source: a path, a `file://` or base64 `data:` URL, or the bytes of a file.

    Returns:
      The name of the source in messages, and an open binary file.

    Raises:
      UserError: the source is none of these, or cannot be opened.
    """
    if isinstance(source, bytes):
        return "image bytes", io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"an image must be a path, bytes or a PIL image, got {type(source).__name__}"
        )
    text = os.fspath(source)
    scheme = text.split(":", 1)[0].lower() if isinstance(text, str) and ":" in text else ""
    if scheme == "data":
        return "data: URL", io.BytesIO(_decode_data_url(text))
    check_local(text)
    path = user_path(text, "the picture")
    try:
        if is_remote(path):
            return clip(str(path)), io.BytesIO(read_file(path))
        return clip(str(path)), path.open("rb")
    except OSError as error:
        raise UserError(
            cannot_open(str(path), error, "expected the path of an image file")
        ) from error


def check_local(text: str) -> None:
    """Raises UserError if an image is an `http` or `https` URL."""
    if text[:6].lower().startswith(("http:", "https:")):
        raise UserError(f"{clip(text)}: pictures are not fetched; download it and give its path")


def cannot_open(path: str, error: Exception, advice: str) -> str:
    """Returns the message about an image that cannot be opened.

    Args:
      path: its path.
      error: what the system says.
      advice: what to do, unless the path is really base64.
    """
    encoded = re.search(r"(?:[A-Za-z0-9+/=_-]\s?){100,}", path[:2000]) is not None
    most = 200
    if encoded or any(start in path[:1000] for start in ("/9j/4", "iVBORw0", "R0lGOD", "UklGR")):
        advice, most = "it looks like base64: write {'bytes': '...'}", 60
    return f"{clip(path, most)}: cannot open the picture ({reason(error)}); {advice}"


def decode_base64(text: str) -> bytes:
    """Decodes base64 in any of its forms.

    White space and line ends are skipped, also if they were escaped twice; `-` and `_` are those of
    the urlsafe alphabet; the padding may be missing.  A `data:` URL is decoded, too, and so is
    the text that `str` makes of Python bytes, `b'...'`.

    Args:
      text: the encoded bytes.

    Raises:
      UserError: the text has other characters, or it is cut off.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        return _decode_data_url(text)
    if text[:2] in ("b'", 'b"') and text[-1:] == text[1]:
        text = text[2:-1]
    if "\\" in text:
        text = _ESCAPES.sub("", text)
    text = "".join(text.split()).translate(_URLSAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"not valid base64 ({reason(error)}), {shown(text, 60)}; encode it again"
        ) from error


def without_texts(file: IO[bytes]) -> IO[bytes] | None:
    """Copies a PNG file without its texts and colour profile, which have no pixels.

    Pillow refuses whole files whose texts are large.

    Args:
      file: an image file of any format.

    Returns:
      The copy; None if the file is no PNG or has no such chunk.
    """
    file.seek(0)
    if file.read(len(_PNG)) != _PNG:
        return None
    copy, dropped = io.BytesIO(), False
    copy.write(_PNG)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        content = file.read(length + 4)  # with the checksum
        if kind in _PNG_TEXTS:
            dropped = True
        else:
            copy.write(head + content)
    copy.seek(0)
    return copy if dropped else None


def has_metadata(file: IO[bytes]) -> bool:
    """Returns whether a PNG file has EXIF or a text, in which EXIF may be.

    Args:
      file: a PNG file; its place is changed.
    """
    file.seek(len(_PNG))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf" or kind in _PNG_TEXTS[:3]:
            return True
        file.seek(length + 4, 1)
    return False


def _decode_data_url(url: str) -> bytes:
    """Decodes `data:image/...;base64,...`; the header may have more parameters."""
    header, comma, payload = url.partition(",")
    words = [word.strip().lower() for word in header[:1000].partition(":")[2].split(";")]
    if not comma or "base64" not in words:
        raise UserError(
            f"data: URL {shown(url, 60)}: only data:image/...;base64,... is read; encode it so"
        )
    try:
        return decode_base64(urllib.parse.unquote(payload) if "%" in payload else payload)
    except UserError as error:
        raise UserError(f"data: URL: {error}") from error
