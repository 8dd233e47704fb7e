"""Limits of a sample, which are checked before its images are decoded.

Axis legend: T tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vl2jax.common.errors import UserError


class TooLong(UserError):
    """A sample has too many tokens or tiles."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Room for a sample.

    Attributes:
      length: maximum number of tokens.
      tiles: maximum number of tiles.
      truncate: whether a sample that is longer is cut at its end, see `end_of_room`.
      check: called with the numbers of tokens and tiles of a sample that is not cut; raises
        `TooLong` if it has no room.
    """

    length: int
    tiles: int
    truncate: bool
    check: Callable[[int, int], None]


def end_of_room(
    image_index: np.ndarray, tiles: Sequence[int], tokens: Sequence[int], limits: Limits
) -> tuple[int, int]:
    """Finds where a sample is cut.

    It is cut at its end, and never through an image: an image that does not fit as a whole is
    dropped with all that follows it.

    Args:
      image_index: int32[T], as in `Batch`.
      tiles: number of tiles of each image, in order.
      tokens: number of tokens of each image.
      limits: the room.

    Returns:
      The number of tokens and the number of images that are kept.
    """
    end = min(len(image_index), limits.length)
    visual = np.flatnonzero(image_index >= 0)
    first = used = 0
    for number, (width, height) in enumerate(zip(tokens, tiles, strict=True)):
        start = int(visual[first])
        first, used = first + width, used + height
        if start + width > end or used > limits.tiles:
            return min(end, start), number
    return end, len(tiles)
