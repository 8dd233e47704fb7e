"""Keys of rows that are not read, which are said once for each file."""

from collections.abc import Callable

from vl2jax.common.errors import clip, named

_MOST = 50  # keys of a file that are remembered; a file with more has its data in its keys


class UnreadKeys:
    """Says which keys of a file are not read, once for each key."""

    def __init__(self, say: Callable[[str], None]):
        """
        Args:
          say: called with each message.
        """
        self._say = say
        self._said: dict[str, set[str]] = {}

    def add(self, file: str, keys: tuple[str, ...]) -> None:
        """Records keys of a file that are not read.

        Args:
          file: the file.
          keys: the keys.
        """
        said = self._said.setdefault(file, set())
        fresh = set(keys) - said
        if fresh and len(said) < _MOST:
            said |= fresh
            self._say(f"{clip(file)}: the keys {named(fresh)} of rows are not read")
