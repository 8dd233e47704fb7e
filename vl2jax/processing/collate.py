"""Collates samples of different lengths into a `Batch`.

Axis legend: B rows, T tokens, n views of a sample (global views and tiles), I tile slots, S pixels
per tile side, P pools.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.processing.batch import FIRST_TILE_ROW, TEXT, Batch
from vl2jax.processing.image_source import ImageSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenized conversation, without padding.

    Attributes:
      tokens: int32[T].
      image_index: int32[T], as in `Batch`, for a tile pool with the tiles of this sample alone.
      loss_mask: bool[T]; True for tokens that are targets of the loss.
      tiles: uint8[n, S, S, 3]; for each image its global view, then its tiles row by row.
      image_sizes: (width, height) of each image in pixels.
      image_tiles: (columns, rows) of tiles of each image.
      image_tokens: number of tokens of each image.
      prompt_length: number of tokens before the answer at the end; all tokens if there is none.
      display: the conversation as readable text, with placeholders for images.
      image_sources: source of each image; empty in training data.
      truncated: whether its end was cut off, see `limits.end_of_room`.
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
    truncated: bool = False

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
    """Pads samples on the right and concatenates their tiles.

    Args:
      samples: one sample per row.
      pad_id: token id of padding.
      tile_side: S.
      tokens_per_tile: visual tokens per tile.
      length: T; None: the length of the longest sample.
      tile_slots: I; None: the number of tiles.

    Returns:
      A `Batch` of numpy arrays.

    Raises:
      UserError: there is no sample, or the samples do not fit into `length` and `tile_slots`.
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
    """Makes a batch of padding, which `place` fills.

    Args:
      rows: B.
      length: T.
      tile_slots: I.
      pad_id: token id of padding.
      tile_side: S.
      pools: P, a leading axis of all fields, for groups of rows that have their own tile slots;
        None: no such axis.

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
    """Writes a sample into a batch, in place.

    Args:
      batch: numpy arrays without the axis P.
      sample: the sample.
      row: row of its tokens.
      slot: first of its tile slots.
      tokens_per_tile: visual tokens per tile.
      offset: first of its columns.
      segment: its segment id, from 1.
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
