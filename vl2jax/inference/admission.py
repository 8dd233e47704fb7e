"""Admission: which waiting sequences are prefilled next, and what they share.

The queue counts how many waiting prompts begin with each block (`Prompt.blocks`).  A prompt whose
beginning other waiting prompts share is prefilled first, and its cache is kept; the others then
move to the front of the queue and reuse it.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from vl2jax.inference.buckets import length_bucket
from vl2jax.inference.prefix_cache import LEAST, Prefix, PrefixCache
from vl2jax.inference.sequence import BLOCK, Prompt, Sequence, common_blocks

_MAX_PREFILL_TOKENS = 8192  # maximum number of tokens in one prefill, including padding
_MAX_PADDED_TOKENS = 2048  # the same for a prefill that is more than half padding


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences that are prefilled together.

    Attributes:
      rows: the sequences.  Their prompts start with the same `common` tokens as `prefix`.
      prefix: cached prefix that they share; None if `common` is 0.
      common: number of tokens that are taken from the cached prefix.
      keep: whether to add the prompt of the first sequence to the prefix cache, because waiting
        prompts share its prefix.
    """

    rows: list[Sequence]
    prefix: Prefix | None = None
    common: int = 0
    keep: bool = False


class WaitingQueue:
    """The next sequences of a source that is read lazily, roughly in its order."""

    def __init__(self, source: Iterator[Sequence], most: int):
        """
        Args:
          source: the sequences.
          most: maximum number of sequences that are read ahead.
        """
        self._source, self._most = source, most
        self._rows: list[Sequence] = []
        self._counts: collections.Counter[bytes] = collections.Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def refill(self) -> None:
        """Takes sequences from the source until `most` are waiting."""
        fresh = list(itertools.islice(self._source, max(0, self._most - len(self))))
        self._rows += fresh
        for row in fresh:
            self._counts.update(row.prompt.blocks)

    def upcoming(self, count: int) -> list[Sequence]:
        """The first `count` sequences."""
        return self._rows[:count]

    def take(self, prefix_cache: PrefixCache, places: int) -> Group:
        """Removes and returns the sequences to prefill next: the first, and others that fit.

        Args:
          prefix_cache: the cached prefixes.
          places: maximum number of sequences.
        """
        head = self._rows[0]
        prefix, common = prefix_cache.find(head.prompt)
        rows, lengths = [head], [len(head.prompt) - common]
        starts = {_start(head.prompt, common + LEAST)}
        for row in self._rows[1:]:
            if len(rows) == places:
                break
            start = _start(row.prompt, common + LEAST)
            length = len(row.prompt) - common
            if (
                (start is None or start not in starts)  # else it can reuse that prompt's cache
                and _start(row.prompt, common) == _start(head.prompt, common)
                and _fits([*lengths, length])
                and prefix_cache.common_length(row.prompt) == common
                and not self._gains(row.prompt, common)
            ):
                rows.append(row)
                lengths.append(length)
                starts.add(start)
        keep = self._gains(head.prompt, common)
        self._remove(rows)
        if keep:  # those that share most of it come first, so that its cache is not evicted before
            own = head.prompt.blocks
            self._rows.sort(key=lambda row: -common_blocks(own, row.prompt.blocks))
        return Group(rows, prefix, common, keep)

    def _gains(self, prompt: Prompt, common: int) -> bool:
        """Whether a waiting prompt shares at least `LEAST` tokens beyond `common` with another."""
        start = _start(prompt, common + LEAST)
        return start is not None and self._counts[start] > 1

    def _remove(self, rows: Iterable[Sequence]) -> None:
        gone = set(map(id, rows))
        self._rows = [row for row in self._rows if id(row) not in gone]
        for block in itertools.chain.from_iterable(row.prompt.blocks for row in rows):
            self._counts[block] -= 1
            if not self._counts[block]:
                del self._counts[block]


def _start(prompt: Prompt, tokens: int) -> bytes | None:
    """Identifies the first `tokens` tokens of a prompt; None if it does not have so many."""
    at = tokens // BLOCK - 1
    return prompt.blocks[at] if 0 <= at < len(prompt.blocks) else None


def _fits(lengths: list[int]) -> bool:
    """Whether prompts of these lengths may be padded to one length."""
    padded = len(lengths) * length_bucket(max(lengths))
    return padded <= (_MAX_PREFILL_TOKENS if padded <= 2 * sum(lengths) else _MAX_PADDED_TOKENS)
