"""Plain names for directories whose path the storage libraries misread.

TensorStore takes a backslash as a separator, and Orbax takes brackets as a pattern.  Such a
directory is read and written through a symbolic link in the user's cache, whose name is a hash.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from vl2jax.common.compilation_cache import default_directory
from vl2jax.common.errors import UserError

_MISREAD = frozenset("\\[]")


def plain_name(directory: Path) -> Path:
    """Returns an absolute path of a directory that all storage libraries read as it is.

    Args:
      directory: the directory; it need not exist.

    Raises:
      UserError: the path needs a link, and none can be made.
    """
    path = Path(directory).resolve()
    odd = [number for number, part in enumerate(path.parts) if _MISREAD & set(part)]
    if not odd:
        return path
    path, rest = Path(*path.parts[: odd[-1] + 1]), Path(*path.parts[odd[-1] + 1 :])
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]  # the same in all processes of a run
    link = default_directory().parent / "paths" / name
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(path)
    except OSError as error:
        raise UserError(
            f"{path} has a backslash or a bracket, and a link to it could not be made in"
            f" {link.parent} ({error.strerror}); choose another path"
        ) from error
    if _MISREAD & set(str(link)):
        raise UserError(f"{path} has a backslash or a bracket; choose another path")
    return link / rest
