"""One prompt and its answer under way, on the host.

Axis legend: T prompt tokens, n tiles of the prompt, S pixels per tile side, Q tokens per tile.
"""

import dataclasses
import functools
import hashlib
import time
from collections import abc

import numpy as np

from vl2jax.inference.completion import Completion
from vl2jax.processing.batch import FIRST_TILE_ROW, TEXT, Batch

_OF_A_PICTURE = np.uint64(1 << 63)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: rows of one tile get keys of their own


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Integers and tiles of one prompt.

    Attributes:
      tokens, image_index: int32[T], see `Sample`; the index is into the prompt's own tiles.
      tiles: uint8[n, S, S, 3].
      tokens_per_tile: Q.
    """

    tokens: np.ndarray
    image_index: np.ndarray
    tiles: np.ndarray
    tokens_per_tile: int

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def digests(self) -> list[int]:
        """What each tile is known by: 63 bits of a hash of its pixels."""
        digest = functools.partial(hashlib.blake2b, digest_size=8)
        return [int.from_bytes(digest(tile.tobytes()).digest()) >> 1 for tile in self.tiles]

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """uint64[T]: equal where two prompts have the same input, be it text or picture."""
        keys, index = self.tokens.astype(np.uint64), self.image_index
        learned = (index != TEXT) & (index < FIRST_TILE_ROW)
        keys[learned] = _OF_A_PICTURE | index[learned].astype(np.uint64)
        tile, row = np.divmod(index - FIRST_TILE_ROW, self.tokens_per_tile)
        visual = index >= FIRST_TILE_ROW
        digests = np.array(self.digests, np.uint64)
        at = row[visual].astype(np.uint64) * _SPREAD
        keys[visual] = _OF_A_PICTURE | (digests[tile[visual]] ^ at)
        return keys

    @property
    def digest(self) -> str:
        """Short, and equal where two prompts have the same input."""
        return hashlib.blake2b(self.keys.tobytes(), digest_size=8).hexdigest()

    def placed(self, slots: abc.Sequence[int]) -> np.ndarray:
        """The image index if tile i lies in slot `slots[i]` of a pool: int32[T]."""
        index = self.image_index.copy()
        visual = index >= FIRST_TILE_ROW
        tile, row = np.divmod(index[visual] - FIRST_TILE_ROW, self.tokens_per_tile)
        at = np.asarray(slots, np.int32)[tile]
        index[visual] = FIRST_TILE_ROW + at * self.tokens_per_tile + row
        return index


def prompts_of(batch: Batch, lengths: np.ndarray, tokens_per_tile: int) -> list[Prompt]:
    """The rows of a batch, each with its own tiles."""
    tiles, prompts = np.asarray(batch.tiles), []
    for row, length in enumerate(lengths):
        index = np.asarray(batch.image_index)[row, :length].astype(np.int32)
        visual = index >= FIRST_TILE_ROW
        used, own = np.unique(
            (index[visual] - FIRST_TILE_ROW) // tokens_per_tile, return_inverse=True
        )
        rows = (index[visual] - FIRST_TILE_ROW) % tokens_per_tile
        index[visual] = FIRST_TILE_ROW + own.astype(np.int32) * tokens_per_tile + rows
        tokens = np.asarray(batch.tokens)[row, :length].astype(np.int32)
        prompts.append(Prompt(tokens, index, tiles[used], tokens_per_tile))
    return prompts


@dataclasses.dataclass(frozen=True)
class Generation:
    """One row's answer.

    Attributes:
      tokens: ids after the prompt, the end token included if it came.
      finish_reason: "stop" (end token or stop string) or "length".
      text: the tokens as text without the end token, cut before a stop string; None without a
        tokenizer.
      prompt_tokens: length of the prompt.
      seconds_to_first_token: from the call to the first token, compilation included; of a row that
        waited in a queue, from when it was taken in.
      tokens_per_second: of this row after its first token; 0 if there was only one.
    """

    tokens: list[int]
    finish_reason: str
    text: str | None
    prompt_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float


@dataclasses.dataclass(eq=False)
class Sequence:
    """An answer under way, with its clock."""

    answer: Completion
    prompt: Prompt
    seed: int
    started: float
    first: float = 0.0
    last: float = 0.0

    @property
    def done(self) -> bool:
        return self.answer.finish_reason is not None

    @property
    def room(self) -> int:
        return self.answer.max_new_tokens - len(self.answer.tokens)

    @property
    def total(self) -> int:
        """Length of the prompt and the longest possible answer."""
        return len(self.prompt) + self.answer.max_new_tokens

    def push(self, tokens: abc.Sequence[int]) -> str:
        """Takes the tokens of a burst, up to the end of the answer; gives the new text."""
        if self.done:
            return ""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return self.answer.push(tokens)

    def result(self) -> Generation:
        count, seconds = len(self.answer.tokens), self.last - self.first
        return Generation(
            tokens=list(self.answer.tokens),
            finish_reason=self.answer.finish_reason or "length",
            text=self.answer.text,
            prompt_tokens=len(self.prompt),
            seconds_to_first_token=self.first - self.started,
            tokens_per_second=(count - 1) / seconds if seconds > 0 else 0.0,
        )
