"""Samples of different lengths become one `Batch`.

Axis legend: B rows, T tokens, n views of a sample (global views and tiles), I tile slots, S pixels
per tile side.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vl2jax.batch import FIRST_TILE_ROW, TEXT, Batch
from vl2jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation, not padded.

    Attributes:
      tokens: int32[T].
      image_index: int32[T], as in `Batch`, for a tile pool that holds this sample alone.
      loss_mask: bool[T]. True where the token is a target.
      tiles: uint8[n, S, S, 3]. Per image its global view, then its tiles row by row.
      image_sizes: (width, height) in pixels of each image used.
      image_tiles: (across, down) of each image used.
      image_tokens: tokens that each image takes.
      prompt_length: tokens before the text of the last answer; all where none has begun.
      display: the conversation as one readable text, images as placeholders.
    """

    tokens: np.ndarray
    image_index: np.ndarray
    loss_mask: np.ndarray
    tiles: np.ndarray
    image_sizes: tuple[tuple[int, int], ...]
    image_tiles: tuple[tuple[int, int], ...]
    image_tokens: tuple[int, ...]
    prompt_length: int
    display: str

    def __len__(self) -> int:
        return len(self.tokens)


def collate(
    samples: Sequence[Sample],
    *,
    pad_id: int,
    tile_side: int,
    tokens_per_tile: int,
    length: int | None = None,
    tile_slots: int | None = None,
) -> Batch:
    """Pads samples on the right and puts their tiles into one pool, in order.

    Args:
      pad_id: token at padding.
      tile_side: S.
      tokens_per_tile: rows of the visual table per tile.
      length: T; None for the longest sample's.
      tile_slots: I; None for as many as there are tiles.

    Returns:
      A `Batch` of numpy arrays.

    Raises:
      UserError: there is no sample, or they do not fit.
    """
    if not samples:
        raise UserError("a batch needs at least one sample")
    longest = max(map(len, samples))
    used = sum(len(sample.tiles) for sample in samples)
    length = longest if length is None else length
    tile_slots = used if tile_slots is None else tile_slots
    if longest > length or used > tile_slots:
        raise UserError(
            f"samples of up to {longest} tokens with {used} tiles in all do not fit into"
            f" length {length} and {tile_slots} tile slots"
        )
    shape = (len(samples), length)
    batch = Batch(
        tiles=np.zeros((tile_slots, tile_side, tile_side, 3), np.uint8),
        tokens=np.full(shape, pad_id, np.int32),
        image_index=np.full(shape, TEXT, np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (len(samples), 1)),
        segment_ids=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
    )
    slot = 0
    for row, sample in enumerate(samples):
        count, tiles, index = len(sample), len(sample.tiles), sample.image_index
        batch.tiles[slot : slot + tiles] = sample.tiles
        batch.tokens[row, :count] = sample.tokens
        batch.image_index[row, :count] = index + np.where(
            index >= FIRST_TILE_ROW, slot * tokens_per_tile, 0
        )
        batch.segment_ids[row, :count] = 1
        batch.loss_mask[row, :count] = sample.loss_mask
        slot += tiles
    return batch
