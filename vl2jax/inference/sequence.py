"""A prompt, and a sequence: a prompt with the answer that is being generated.  All on the host.

Axis legend: T prompt tokens, n tiles of the prompt, S pixels per tile side, Q tokens per tile.
"""

import bisect
import dataclasses
import functools
import hashlib
import time
from collections import abc

import numpy as np

from vl2jax.inference.completion import Completion
from vl2jax.processing.batch import FIRST_TILE_ROW, TEXT, Batch

_IMAGE_BIT = np.uint64(1 << 63)  # set in the keys of visual positions
_ROW_MULTIPLIER = np.uint64(
    0x9E3779B97F4A7C15
)  # odd, so that the rows of a tile get different keys


BLOCK = 16  # tokens per block; prefixes are shared in whole blocks


def block_hashes(keys: np.ndarray) -> list[bytes]:
    """Hashes of the whole blocks of a sequence, each of the block and all before it.

    So two sequences begin with the same i + 1 blocks if, and only if, their i-th hashes are equal.

    Args:
      keys: uint64[T], see `Prompt.keys`.
    """
    chain, hashes = hashlib.blake2b(digest_size=16), []
    for end in range(BLOCK, len(keys) + 1, BLOCK):
        chain.update(keys[end - BLOCK : end].tobytes())
        hashes.append(chain.digest())
    return hashes


def common_blocks(hashes: abc.Sequence[bytes], others: abc.Sequence[bytes]) -> int:
    """Number of blocks with which both of two sequences begin, given their `block_hashes`."""
    # Hashes are equal up to some block and differ from there on.
    shorter = range(min(len(hashes), len(others)))
    return bisect.bisect_left(shorter, True, key=lambda i: hashes[i] != others[i])


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Tokens and image tiles of one prompt.

    Attributes:
      tokens: int32[T], see `Sample`.
      image_index: int32[T], see `Sample`; tiles are numbered within the prompt.
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
        """A 63-bit hash of the pixels of each tile."""
        digest = functools.partial(hashlib.blake2b, digest_size=8)
        return [int.from_bytes(digest(tile.tobytes()).digest()) >> 1 for tile in self.tiles]

    @functools.cached_property
    def keys(self) -> np.ndarray:
        """uint64[T]: a key per position, equal if two prompts have the same input there.

        The key of a text token is its id.  The key of a visual position has the top bit set: it is
        made from the hash of its tile and the row in the tile, or is the index of a learned row.
        """
        keys, index = self.tokens.astype(np.uint64), self.image_index
        learned = (index != TEXT) & (index < FIRST_TILE_ROW)
        keys[learned] = _IMAGE_BIT | index[learned].astype(np.uint64)
        tile, row = np.divmod(index - FIRST_TILE_ROW, self.tokens_per_tile)
        visual = index >= FIRST_TILE_ROW
        digests = np.array(self.digests, np.uint64)
        at = row[visual].astype(np.uint64) * _ROW_MULTIPLIER
        keys[visual] = _IMAGE_BIT | (digests[tile[visual]] ^ at)
        return keys

    @functools.cached_property
    def blocks(self) -> list[bytes]:
        """Hashes of the blocks that can be reused; at least one token is left to prefill."""
        return block_hashes(self.keys[:-1])

    @property
    def digest(self) -> str:
        """A hash of the whole prompt, as 16 hexadecimal digits."""
        return hashlib.blake2b(self.keys.tobytes(), digest_size=8).hexdigest()

    def image_index_in(self, slots: abc.Sequence[int]) -> np.ndarray:
        """Image index into a table that has tile i in tile slot `slots[i]`: int32[T]."""
        index = self.image_index.copy()
        visual = index >= FIRST_TILE_ROW
        tile, row = np.divmod(index[visual] - FIRST_TILE_ROW, self.tokens_per_tile)
        at = np.asarray(slots, np.int32)[tile]
        index[visual] = FIRST_TILE_ROW + at * self.tokens_per_tile + row
        return index


def split_batch(batch: Batch, lengths: np.ndarray, tokens_per_tile: int) -> list[Prompt]:
    """Splits a batch into prompts, each with its own tiles.

    Args:
      batch: one sequence per row, padded on the right.
      lengths: int[B], number of tokens of each row.
      tokens_per_tile: Q.
    """
    tiles, prompts = np.asarray(batch.tiles), []
    for row, length in enumerate(lengths):
        index = np.asarray(batch.image_index)[row, :length].astype(np.int32)
        visual = index >= FIRST_TILE_ROW
        used, tile_of_position = np.unique(
            (index[visual] - FIRST_TILE_ROW) // tokens_per_tile, return_inverse=True
        )
        rows = (index[visual] - FIRST_TILE_ROW) % tokens_per_tile
        index[visual] = FIRST_TILE_ROW + tile_of_position.astype(np.int32) * tokens_per_tile + rows
        tokens = np.asarray(batch.tokens)[row, :length].astype(np.int32)
        prompts.append(Prompt(tokens, index, tiles[used], tokens_per_tile))
    return prompts


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished answer.

    Attributes:
      tokens: generated token ids, including the end token if it was generated.
      finish_reason: "stop" (end token or stop string), "length", or "error".
      text: the tokens as text, without the end token and cut before a stop string; None without a
        tokenizer.
      prompt_tokens: number of tokens of the prompt.
      seconds_to_first_token: seconds from `Engine.row` to the first token, including compilation
        and the time in the engine's queue.
      tokens_per_second: decoding speed of this sequence after its first token; 0 if it has only
        one.
      error: what went wrong, in one line, if `finish_reason` is "error"; `tokens` and `text` are
        those before.
    """

    tokens: list[int]
    finish_reason: str
    text: str | None
    prompt_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    error: str | None = None


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and the answer that is being generated.

    Attributes:
      answer: tokens and text so far.
      prompt: the prompt.
      seed: seed of the random draws, 64 bits.
      start_time, first, last: times of the start, the first and the last token, in seconds of
        `time.perf_counter`; 0 for a token that has not been generated.
    """

    answer: Completion
    prompt: Prompt
    seed: int
    start_time: float
    first: float = 0.0
    last: float = 0.0

    @property
    def done(self) -> bool:
        """Whether the answer is finished."""
        return self.answer.finish_reason is not None

    @property
    def remaining_tokens(self) -> int:
        """Number of tokens that may still be generated."""
        return self.answer.max_new_tokens - len(self.answer.tokens)

    @property
    def max_length(self) -> int:
        """Length of the prompt plus the maximum length of the answer."""
        return len(self.prompt) + self.answer.max_new_tokens

    def push(self, tokens: abc.Sequence[int]) -> str:
        """Adds tokens of a burst up to the end of the answer; returns text that can be shown."""
        if self.done:
            return ""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return self.answer.push(tokens)

    def result(self) -> Generation:
        """The answer and its timing."""
        count, seconds = len(self.answer.tokens), self.last - self.first
        return Generation(
            tokens=list(self.answer.tokens),
            finish_reason=self.answer.finish_reason or "length",
            text=self.answer.text,
            prompt_tokens=len(self.prompt),
            seconds_to_first_token=self.first - self.start_time,
            tokens_per_second=(count - 1) / seconds if seconds > 0 else 0.0,
            error=self.answer.error,
        )
