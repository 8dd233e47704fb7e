"""Errors that a user can cause.  Command lines print them as one line and exit with status 1.

Messages never print a value of any size: `shown` is for values, `clip` for texts and paths, `named`
for lists of names and `reason` for exceptions of other libraries.
"""

import errno
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


def is_disk_full(error: Exception) -> bool:
    """Returns whether an error of the OS or of a storage library means that the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


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
