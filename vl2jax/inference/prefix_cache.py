"""Prefix caching: a prefix that several prompts share is prefilled once."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vl2jax.inference.sequence import Prompt
from vl2jax.model.decoder import Caches

LEAST = 32  # minimum length of a shared prefix
_GRANULARITY = 16  # shared lengths are multiples of it, so that more prompts share the same length
_MAX_PREFIXES = 4  # maximum number of cached prefixes


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix and its KV cache.

    Attributes:
      keys: uint64[T], keys of the tokens, see `Prompt.keys`.
      caches: caches with one batch row and at least T slots.
    """

    keys: np.ndarray
    caches: Caches

    def common_length(self, prompt: Prompt) -> int:
        """Number of tokens that the prompt can reuse, see `common_length`."""
        return common_length(self.keys, prompt.keys)


def common_length(keys: np.ndarray, others: np.ndarray) -> int:
    """Length of the common prefix of two key arrays, rounded down to a multiple of `_GRANULARITY`.

    Args:
      keys: uint64[T], keys of the cached tokens.
      others: uint64[T], keys of a prompt.  At least one token of it is left to prefill.

    Returns:
      The length; 0 if it is below `LEAST`.
    """
    size = min(len(keys), len(others) - 1)
    differ = keys[:size] != others[:size]
    common = int(differ.argmax()) if differ.any() else size
    return common // _GRANULARITY * _GRANULARITY if common >= LEAST else 0


class PrefixCache:
    """The most recently used prefixes; the least recently used is evicted first."""

    def __init__(self):
        self._prefixes: list[Prefix] = []

    def find(self, prompt: Prompt) -> tuple[Prefix | None, int]:
        """Returns the prefix that shares most tokens with the prompt, and their number.

        Returns (None, 0) if no prefix shares enough tokens.
        """
        found = max(self._prefixes, key=lambda prefix: prefix.common_length(prompt), default=None)
        if found is None or not (common := found.common_length(prompt)):
            return None, 0
        self._prefixes.remove(found)
        self._prefixes.append(found)
        return found, common

    def add(self, prefix: Prefix) -> None:
        """Adds a prefix; evicts those that it extends and, if the cache is full, the oldest."""
        size = len(prefix.keys)
        self._prefixes = [
            old
            for old in self._prefixes
            if len(old.keys) > size or not np.array_equal(old.keys, prefix.keys[: len(old.keys)])
        ][1 - _MAX_PREFIXES :]
        self._prefixes.append(prefix)


def any_shares_prefix(prompt: Prompt, waiting: Sequence[Prompt]) -> bool:
    """Whether a waiting prompt shares a prefix with this one."""
    return any(common_length(prompt.keys, other.keys) for other in waiting)
