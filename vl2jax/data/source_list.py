"""The list of sources in a run configuration: paths with weights, in one text."""

import math
import os

from vl2jax.common.errors import UserError, shown
from vl2jax.common.paths import is_remote, user_path
from vl2jax.data.patterns import matches

SYNTHETIC = "synthetic"


def read_sources(text: str, name: str) -> list[tuple[str, float]]:
    """Parses sources such as "a.jsonl=0.7,b.json=0.3".

    A comma or `=` may be part of a path: several pieces between commas are one path if such a file,
    folder or pattern exists, and `=` only separates a weight if a number follows it.  A path that
    exists as it stands has no weight: `run=1` is the folder `run=1` if there is no `run`.

    Args:
      text: comma-separated sources; a weight is 1 if it is not given.
      name: name of the configuration field, for error messages.

    Returns:
      Path (or "synthetic") and weight of each source.

    Raises:
      UserError: a weight is not above 0, a path is not usable (see `user_path`), or there is no
        source.
    """
    pieces, sources = text.split(","), []
    while pieces:
        count = _pieces_of_first(pieces, name)
        part = ",".join(pieces[:count]).strip()
        pieces = pieces[count:]
        if part:
            sources.append(_read_source(part, name))
    if not sources:
        raise UserError(f"{name} has no source; expected 'synthetic' or the path of a data file")
    return sources


def _pieces_of_first(pieces: list[str], name: str) -> int:
    """Number of pieces that are the first source; more than one if they exist as one path."""
    for count in range(len(pieces), 1, -1):
        part = ",".join(pieces[:count]).strip()
        if part and any(_exists(path, name) for path in (part, _split_weight(part)[0])):
            return count
    return 1


def _read_source(part: str, name: str) -> tuple[str, float]:
    """Path and weight of one source."""
    path, weight = _split_weight(part)
    if weight is not None and not _exists(path, name) and _exists(part, name):
        path, weight = part, None
    if weight is not None and not 0 < weight < math.inf:
        raise UserError(f"{name}: {shown(part, 200)} must be PATH=WEIGHT with a weight above 0")
    if path != SYNTHETIC:
        path = str(user_path(path, name))
    return path, 1.0 if weight is None else weight


def _split_weight(part: str) -> tuple[str, float | None]:
    """Splits `PATH=WEIGHT`; the weight is None if no number follows the last `=`."""
    path, equals, weight = part.rpartition("=")
    try:
        return (path.rstrip(), float(weight)) if equals else (part, None)
    except ValueError:
        return part, None


def _exists(text: str, name: str) -> bool:
    """Whether a local file, folder or pattern exists; object stores are not asked."""
    if not text.strip() or is_remote(text):
        return False
    return bool(matches(os.fspath(user_path(text, name))))
