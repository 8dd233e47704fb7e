"""The errors a user can cause; command lines print them as one line and exit with 1."""

import errno


class UserError(ValueError):
    """Bad input: the message names the thing, what was expected, and the fix."""


def is_disk_full(error: Exception) -> bool:
    """Whether an error of the system or of a storage library means that no space is left."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
