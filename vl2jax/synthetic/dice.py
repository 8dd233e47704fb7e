"""Random choices that depend only on a key."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 128


class Dice:
    """Random generator for scalar choices; must not be shared between threads.

    All choices are made of uniform numbers, which are generated in blocks, so that a single choice
    is fast.
    """

    def __init__(self, *key: int):
        """Makes a generator.

        Args:
          key: non-negative integers, the seed.
        """
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._numbers: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Returns a number in [low, high)."""
        if not self._numbers:
            self._numbers = self._generator.random(_BLOCK).tolist()
        return low + (high - low) * self._numbers.pop()

    def below(self, count: int) -> int:
        """Returns an integer in [0, count)."""
        return int(self.uniform() * count)

    def between(self, low: int, high: int) -> int:
        """Returns an integer in [low, high], both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self.uniform() < probability

    def pick(self, items: Sequence[T]) -> T:
        """Returns one of the items, all with equal probability."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Returns `count` items without replacement, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """Returns one of the keys, with probabilities proportional to their values."""
        left = self.uniform(0.0, sum(weights.values()))
        for item, weight in weights.items():
            left -= weight
            if left < 0:
                return item
        return [*weights][-1]  # reached only by rounding errors
