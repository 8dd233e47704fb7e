"""Prefix caching: a prefix that several prompts share is prefilled once.

Prefixes are found by the hashes of their blocks, so a search takes time linear in the blocks of one
prompt, however many prompts wait.
"""

import dataclasses

from vl2jax.inference.sequence import BLOCK, Prompt, common_blocks
from vl2jax.model.decoder import Caches

LEAST = 32  # minimum length of a shared prefix
_MAX_PREFIXES = 4  # maximum number of cached prefixes


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """A prefix and its KV cache.

    Attributes:
      blocks: hashes of its blocks, see `block_hashes`.
      caches: caches with one batch row and slots for all blocks.
    """

    blocks: list[bytes]
    caches: Caches

    def common_length(self, prompt: Prompt) -> int:
        """Number of tokens of the prompt that are in this prefix; 0 if below `LEAST`."""
        common = BLOCK * common_blocks(self.blocks, prompt.blocks)
        return common if common >= LEAST else 0


class PrefixCache:
    """The most recently used prefixes; the least recently used is evicted first."""

    def __init__(self):
        self._prefixes: list[Prefix] = []

    def common_length(self, prompt: Prompt) -> int:
        """Number of tokens of the prompt that are in a cached prefix."""
        return max((prefix.common_length(prompt) for prefix in self._prefixes), default=0)

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
        size = len(prefix.blocks)
        self._prefixes = [
            old
            for old in self._prefixes
            if len(old.blocks) > size or old.blocks != prefix.blocks[: len(old.blocks)]
        ][1 - _MAX_PREFIXES :]
        self._prefixes.append(prefix)
