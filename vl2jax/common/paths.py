"""Paths that a user gives: each passes `user_path` before anything is read or written."""

import argparse
import importlib.util
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from etils import epath

from vl2jax.common.errors import UserError

AnyPath = Path | epath.Path
STORES = {"gs": "gcsfs", "s3": "s3fs"}  # schemes of object stores, and the package each needs
_EXTRAS = {"gs": "gcs", "s3": "s3"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)")  # one letter is a drive of Windows
_SHOWN = 200  # characters of a path in a message


def user_path(value: str | os.PathLike, what: str, *, remote: bool = True) -> AnyPath:
    """Converts a path that a user gives; reads and writes nothing.

    - `~` and `~NAME` at the beginning are home directories.
    - `file:///dir/a%20b` is a local path, percent-encoded.
    - `gs://BUCKET/...` and `s3://BUCKET/...` are paths of an object store.

    Args:
      value: the path.
      what: name of the flag or field, for messages.
      remote: whether a path of an object store is allowed.

    Returns:
      A `pathlib.Path`, or an `epath.Path` with the same methods for a path of an object store.

    Raises:
      UserError: the value is no path, is empty, has an unknown scheme or an unknown home directory,
        or is on an object store, and that is not allowed or its package is not installed.
    """
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise UserError(f"{what} must be a path, got {value!r:.80}")
    text = os.fspath(value)
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    if not text.strip():
        raise UserError(f"{what} is empty; expected a path")
    if "\0" in text:
        raise UserError(f"{what} {shown!r} has a null character; expected a path")
    match = _SCHEME.match(text)
    if match is not None and match[1].lower() == "file":
        text = _file_url(text, shown, what)
    elif match is not None:
        return _on_store(text, shown, what, match, remote)
    found = os.path.expanduser(text)
    if found == text and text.startswith("~") and "/" in text:  # `~x` alone may be a file
        raise UserError(f"{what} {shown}: there is no such home directory")
    return Path(found)


def local_path(value: str | os.PathLike, what: str) -> Path:
    """Like `user_path`, but refuses paths of object stores."""
    path = user_path(value, what, remote=False)
    assert isinstance(path, Path)
    return path


def path_flag(*, remote: bool = False, off: bool = False) -> Callable[[str], AnyPath | str]:
    """Returns a parser of paths, as the type of a flag; see `user_path`.

    Args:
      remote: whether a path of an object store is allowed.
      off: whether "off" is allowed, which stays a text.
    """

    def parse(text: str) -> AnyPath | str:
        if off and text == "off":
            return text
        try:
            return user_path(text, "the path", remote=remote)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def has_scheme(text: str) -> bool:
    """Whether a text begins with a scheme, as in `gs://` and `file:/`."""
    return _SCHEME.match(text) is not None


def is_remote(path: AnyPath | str) -> bool:
    """Whether a path is on an object store."""
    match = _SCHEME.match(os.fspath(path))
    return match is not None and match[1] in STORES


def _file_url(text: str, shown: str, what: str) -> str:
    """The local path of a `file:` URL."""
    parts = urllib.parse.urlsplit(text.replace("?", "%3F").replace("#", "%23"))
    path = urllib.parse.unquote(parts.path)
    if parts.netloc not in ("", "localhost") or "\0" in path:
        raise UserError(f"{what} {shown}: expected file:///PATH, a path on this host")
    return path


def _on_store(text: str, shown: str, what: str, match: re.Match, remote: bool) -> AnyPath:
    """The path of an object store."""
    scheme, slashes = match.groups()
    if scheme not in STORES:
        known = "a local path, gs:// or s3://" if remote else "a local path"
        raise UserError(f"{what} {shown}: {scheme}:// is not supported; expected {known}")
    if not remote:
        raise UserError(f"{what} {shown}: expected a local path, not one on an object store")
    bucket = text[match.end() :].split("/", 1)[0]
    if slashes != "//" or not bucket:
        raise UserError(f"{what} {shown}: expected {scheme}://BUCKET/PATH")
    if importlib.util.find_spec(STORES[scheme]) is None:
        raise UserError(
            f"{what} {shown}: {scheme}:// needs {STORES[scheme]}, which is not installed:"
            f' pip install "vl2jax[{_EXTRAS[scheme]}]"'
        )
    return epath.Path(text)
