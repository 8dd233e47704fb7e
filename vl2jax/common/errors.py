"""Errors that a user can cause.  Command lines print them as one line and exit with status 1."""

import errno
from collections.abc import Sequence


class UserError(ValueError):
    """Invalid input; the message names the input, what was expected, and the fix."""


def is_disk_full(error: Exception) -> bool:
    """Returns whether an error of the OS or of a storage library means that the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Formats problems as a list, one per line.

    Args:
      problems: the problems.
      most: maximum number of problems to show; a last line counts the others.
    """
    shown = [f"  - {problem}" for problem in problems[:most]]
    return "\n".join(shown + [f"  - and {len(problems) - most} more"] * (len(problems) > most))
