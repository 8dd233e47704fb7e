"""Files on object stores (`gs://`, `s3://`), with fsspec.

An object appears as a whole when its upload ends, and nothing is renamed.  The clients' caches of
listings are off, because other programs write there, too.
"""

import contextlib
import errno
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vl2jax.common.compilation_cache import default_directory
from vl2jax.common.errors import UserError
from vl2jax.common.paths import AnyPath
from vl2jax.common.progress import human_bytes


@functools.cache
def _file_system(protocol: str) -> Any:
    if protocol == "gs":  # not gcsfs's default class, which asks for the layout of each bucket
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(use_listings_cache=False)
    from s3fs import S3FileSystem

    return S3FileSystem(use_listings_cache=False)


def file_system(path: AnyPath) -> Any:
    """The fsspec file system of a path on an object store."""
    return _file_system(str(path).partition("://")[0])


@contextlib.contextmanager
def storage_errors(path: AnyPath) -> Iterator[None]:
    """Context manager that converts all errors of an object store's client to OSError.

    The clients raise exceptions of several libraries, which have no common class.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _io_error(error, path) from error


def _io_error(error: Exception, path: AnyPath) -> OSError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    code = errno.ENOENT if kind is FileNotFoundError else errno.EIO
    return kind(code, text, str(path))


def list_files(directory: AnyPath) -> dict[str, int]:
    """Sizes of all files below a directory, by path relative to it; {} if there is none."""
    with storage_errors(directory):
        try:
            found = file_system(directory).find(str(directory), detail=True)
        except FileNotFoundError:
            return {}
    base = PurePosixPath(str(directory).partition("://")[2])
    return {
        PurePosixPath(name).relative_to(base).as_posix(): int(info["size"])
        for name, info in found.items()
        if PurePosixPath(name) != base
    }


def read_file(path: AnyPath) -> bytes:
    """Reads a whole object."""
    with storage_errors(path):
        return file_system(path).cat_file(str(path))


def write_file(path: AnyPath, content: bytes) -> None:
    """Writes a whole object."""
    with storage_errors(path):
        file_system(path).pipe_file(str(path), content)


def upload(source: Path, target: AnyPath) -> None:
    """Uploads a file."""
    with storage_errors(target):
        file_system(target).put_file(str(source), str(target))


def download(source: AnyPath, target: Path) -> None:
    """Downloads an object to a local file, which appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=".partial-")
    os.close(descriptor)
    try:
        with storage_errors(source):
            file_system(source).get_file(str(source), partial)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def remove_tree(directory: AnyPath) -> None:
    """Removes all objects below a directory."""
    names = list_files(directory)
    with storage_errors(directory):
        for name in names:
            file_system(directory).rm_file(str(directory / name))


def move_tree(source: AnyPath, target: AnyPath) -> None:
    """Copies all objects below a directory to another one, and removes them."""
    for name in list_files(source):
        with storage_errors(source):
            file_system(source).cp_file(str(source / name), str(target / name))
    remove_tree(source)


def local_copy(path: AnyPath) -> Path:
    """Copies an object into the user's cache, unless the same one is there already.

    Data files are read in any order, so they are copied once; other runs use the copy again.

    Raises:
      OSError: the object cannot be read, or the disk is full.
    """
    with storage_errors(path):
        info = file_system(path).info(str(path))
    version = [info.get(key) for key in ("size", "generation", "etag", "ETag", "LastModified")]
    name = hashlib.sha256(repr((str(path), version)).encode()).hexdigest()[:32]
    target = default_directory().parent / "data" / name / PurePosixPath(str(path)).name
    if not target.exists():
        print(f"copying  {path} ({human_bytes(info['size'])}) to {target}", file=sys.stderr)
        download(path, target)
    return target


@functools.cache
def local_files(directory: AnyPath, names: tuple[str, ...]) -> Path:
    """Downloads small files of a directory to a temporary one, once per process.

    Args:
      directory: the directory on an object store.
      names: names of the files; those that do not exist are left out.

    Returns:
      The temporary directory, which is removed when the process ends.
    """
    temporary = tempfile.TemporaryDirectory(prefix="vl2jax-")
    _KEPT.append(temporary)
    folder = Path(temporary.name)
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            download(directory / name, folder / name)
    return folder


_KEPT: list[Any] = []  # temporary directories until the process ends
