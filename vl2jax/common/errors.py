"""Errors that a user can cause.  Command lines print them as one line and exit with status 1.

Messages never print a value of any size: `shown` is for values, `clip` for texts and paths, `named`
for lists of names and `reason` for exceptions of other libraries.
"""

import errno
import os
import re
import reprlib
from collections.abc import Iterable, Sequence

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 6, 6, 6
_REPR.maxstring = _REPR.maxother = 60


class UserError(ValueError):
    """Invalid input; the message names the input, what was expected, and the fix."""


def shown(value: object, most: int = 80) -> str:
    """Formats any value of the user's data for a message.

    Args:
      value: the value; of bytes, only their number is shown.
      most: maximum number of characters.
    """
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits
        text = f"a value of type {type(value).__name__}"
    return clip(text, most)


def clip(text: str, most: int = 200) -> str:
    """Makes a text one line of at most `most` characters, by removing its middle.

    Args:
      text: the text, for example a path.
      most: maximum number of characters, at least 40.
    """
    if len(text) > most:
        middle = f"...({len(text)} characters)..."
        head = (most - len(middle)) * 2 // 3
        text = text[:head] + middle + text[head + len(middle) - most :]
    return "".join(letter if letter.isprintable() else " " for letter in text)


def named(names: Iterable[object], most: int = 8) -> str:
    """Formats a list of names, such as the keys of a record.

    Args:
      names: the names; they are sorted.
      most: maximum number of names; the others are counted.
    """
    words = sorted(map(str, names))
    more = f", ... ({len(words) - most} more)" if len(words) > most else ""
    return f"[{', '.join(shown(word, 40) for word in words[:most])}{more}]"


def reason(error: BaseException, most: int = 160) -> str:
    """Formats an exception of another library as one short line.

    Args:
      error: the exception.
      most: maximum number of characters.
    """
    text = error.strerror if isinstance(error, OSError) else str(error)
    return clip(" ".join((text or type(error).__name__).split()), most)


# Errors of the OS that mean that a file cannot be written or read: code, and what to say.
_STORAGE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "File too large, for the file system or for `ulimit -f`",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ENAMETOOLONG: "a name is too long",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.EIO: "input/output error of the device",
}
# How storage libraries write the code of such an error.
_CODE = re.compile(r"(?:os_error_code='|\(os error |\[Errno |\[OS error )(\d+)")


def storage_failure(error: BaseException) -> str | None:
    """Returns why storage failed, as a short phrase; None if an error has another cause.

    Args:
      error: an error of the OS, or any error of a storage library, whose classes say nothing.
    """
    code = getattr(error, "errno", None)
    if code in _STORAGE:
        return _STORAGE[code]
    text = str(error)
    if (match := _CODE.search(text)) is not None and int(match[1]) in _STORAGE:
        return _STORAGE[int(match[1])]
    return next((said for code, said in _STORAGE.items() if os.strerror(code) in text), None)


def is_disk_full(error: BaseException) -> bool:
    """Returns whether storage failed because the disk is full or its quota is used up."""
    return storage_failure(error) in (_STORAGE[errno.ENOSPC], _STORAGE[errno.EDQUOT])


def joined(problems: Sequence[str], most: int = 8) -> str:
    """Formats problems on one line.

    Args:
      problems: the problems.
      most: maximum number of problems to show; the others are counted.
    """
    more = [f"and {len(problems) - most} more"] * (len(problems) > most)
    return "; ".join([*(clip(problem, 400) for problem in problems[:most]), *more])


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Formats problems as a list, one per line.

    Args:
      problems: the problems.
      most: maximum number of problems to show; a last line counts the others.
    """
    lines = [f"  - {clip(problem, 400)}" for problem in problems[:most]]
    return "\n".join(lines + [f"  - and {len(problems) - most} more"] * (len(problems) > most))
