"""Caches of prompts whose beginning others share: it is prefilled once."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vl2jax.inference.sequence import Prompt
from vl2jax.model.decoder import Caches

LEAST = 32  # tokens that are worth sharing
_STEP = 16  # shared lengths are multiples, so that rows with one prefix go together
_KEPT = 4  # prefixes kept


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens and their cache.

    Attributes:
      keys: uint64[T], see `Prompt.keys`.
      caches: of one row, with at least T slots.
    """

    keys: np.ndarray
    caches: Caches

    def common_length(self, prompt: Prompt) -> int:
        """How many of its tokens serve the prompt, 0 if too few to be worth it."""
        return common_length(self.keys, prompt.keys)


def common_length(keys: np.ndarray, others: np.ndarray) -> int:
    """Length of the common beginning, leaving the second at least one token of its own."""
    size = min(len(keys), len(others) - 1)
    differ = keys[:size] != others[:size]
    common = int(differ.argmax()) if differ.any() else size
    return common // _STEP * _STEP if common >= LEAST else 0


class PrefixCache:
    """The prefixes lately used; the oldest give way."""

    def __init__(self):
        self._kept: list[Prefix] = []

    def find(self, prompt: Prompt) -> tuple[Prefix | None, int]:
        """The prefix that serves most tokens of the prompt, and how many."""
        found = max(self._kept, key=lambda prefix: prefix.common_length(prompt), default=None)
        if found is None or not (common := found.common_length(prompt)):
            return None, 0
        self._kept.remove(found)
        self._kept.append(found)
        return found, common

    def add(self, prefix: Prefix) -> None:
        """Keeps a prefix, instead of one that it continues or of the oldest."""
        size = len(prefix.keys)
        self._kept = [
            old
            for old in self._kept
            if len(old.keys) > size or not np.array_equal(old.keys, prefix.keys[: len(old.keys)])
        ][1 - _KEPT :]
        self._kept.append(prefix)


def others_begin_alike(prompt: Prompt, waiting: Sequence[Prompt]) -> bool:
    """Whether another prompt that waits begins like this one."""
    return any(common_length(prompt.keys, other.keys) for other in waiting)
