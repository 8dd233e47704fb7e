"""The errors a user can cause; command lines print them as one line and exit with 1."""


class UserError(ValueError):
    """Bad input: the message names the thing, what was expected, and the fix."""
