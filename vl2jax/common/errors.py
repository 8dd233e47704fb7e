"""The errors a user can cause; command lines print them as one line and exit with 1."""

import errno
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input: the message names the thing, what was expected, and the fix."""


def is_disk_full(error: Exception) -> bool:
    """Whether an error of the system or of a storage library means that no space is left."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def listed(problems: Sequence[str], most: int = 20) -> str:
    """Problems below each other, each on its line."""
    shown = [f"  - {problem}" for problem in problems[:most]]
    return "\n".join(shown + [f"  - and {len(problems) - most} more"] * (len(problems) > most))
