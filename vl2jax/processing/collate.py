"""Samples of different lengths become one `Batch`.

Axis legend: B rows, T tokens, n views of a sample (global views and tiles), I tile slots, S pixels
per tile side.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.processing.batch import FIRST_TILE_ROW, TEXT, Batch
from vl2jax.processing.image import ImageSource


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
      image_sources: where each image used comes from; empty in training data.
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
    image_sources: tuple[ImageSource, ...] = ()

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
    batch = empty_batch(len(samples), length, tile_slots, pad_id=pad_id, tile_side=tile_side)
    slot = 0
    for row, sample in enumerate(samples):
        place(batch, sample, row=row, slot=slot, tokens_per_tile=tokens_per_tile)
        slot += len(sample.tiles)
    return batch


def empty_batch(
    rows: int,
    length: int,
    tile_slots: int,
    *,
    pad_id: int,
    tile_side: int,
    pools: int | None = None,
) -> Batch:
    """A batch of nothing but padding, to be written by `place`.

    Args:
      rows: B, `length` T, `tile_slots` I, `tile_side` S.
      pad_id: token at padding.
      pools: P for microbatches with tile slots of their own, as a leading axis; None for no axis.

    Returns:
      A `Batch` of numpy arrays.
    """
    lead = () if pools is None else (pools,)
    shape = (*lead, rows, length)
    return Batch(
        tiles=np.zeros((*lead, tile_slots, tile_side, tile_side, 3), np.uint8),
        tokens=np.full(shape, pad_id, np.int32),
        image_index=np.full(shape, TEXT, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape).copy(),
        segment_ids=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, bool),
    )


def place(
    batch: Batch,
    sample: Sample,
    *,
    row: int,
    slot: int,
    tokens_per_tile: int,
    offset: int = 0,
    segment: int = 1,
) -> None:
    """Writes a sample into a batch of numpy arrays without an axis of pools.

    Args:
      row: where its tokens go, from column `offset` on, as the row's sequence number `segment`.
      slot: where its tiles go, from this slot on.
      tokens_per_tile: rows of the visual table per tile.
    """
    span, index = slice(offset, offset + len(sample)), sample.image_index
    batch.tiles[slot : slot + len(sample.tiles)] = sample.tiles
    batch.tokens[row, span] = sample.tokens
    batch.image_index[row, span] = index + np.where(
        index >= FIRST_TILE_ROW, slot * tokens_per_tile, 0
    )
    batch.positions[row, span] = np.arange(len(sample), dtype=np.int32)
    batch.segment_ids[row, span] = segment
    batch.loss_mask[row, span] = sample.loss_mask
