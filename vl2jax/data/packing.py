"""Samples of different lengths share rows and tile slots: choice of places, and the batch.

Axis legend: P pools, B rows per pool, T tokens per row, I tile slots per pool, S pixels per tile
side.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import jax
import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.processing.batch import Batch
from vl2jax.processing.collate import Sample, empty_batch, place

# Samples that may wait for the next batch: what does not fit into the rest of one batch goes first
# into the next, so more of them fill better, and each holds its tiles in memory.
WAITING = 32


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Both budgets of a batch.

    Attributes:
      pools: P, groups of rows with tile slots of their own: the parts of every microbatch that a
        mesh splits the batch into.
      rows: B, rows of each pool.
      length: T, tokens of each row.
      tiles: I, tile slots that the rows of a pool share.
      segments: samples in a row at most; 1 packs nothing.
    """

    pools: int
    rows: int
    length: int
    tiles: int
    segments: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), int(field.name != "tiles")
            if value < least:
                raise UserError(f"config.batch.{field.name} is {value}, expected {least} or more")

    def check(self, sample: Sample) -> None:
        """Raises UserError for a sample that no batch of this shape can hold."""
        tokens, tiles = len(sample), len(sample.tiles)
        if tokens > self.length:
            raise UserError(
                f"the sample has {tokens} tokens, a row only {self.length}: raise"
                f" config.batch.length to {tokens}, or shorten the sample"
            )
        if tiles > self.tiles:
            raise UserError(
                f"the sample has {tiles} tiles, a part of the batch only {self.tiles} slots: raise"
                f" config.batch.tiles to {tiles} for each part, or give fewer images"
            )


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where a sample lies in a batch: its pool and row, the first of its columns and tile slots.

    `segment` is its number in the row, from 1.
    """

    pool: int
    row: int
    segment: int
    offset: int
    slot: int


class Plan:
    """The room left in one batch."""

    def __init__(self, shape: BatchShape):
        self._shape = shape
        self._columns = np.zeros((shape.pools, shape.rows), np.int64)  # used, of each row
        self._segments = np.zeros((shape.pools, shape.rows), np.int64)
        self._slots = np.zeros(shape.pools, np.int64)  # used, of each pool

    def add(self, tokens: int, tiles: int) -> Place | None:
        """Takes room for a sample; None where there is none.

        A sample goes into the row that it leaves least room in.  Pictures go into the pool with
        most free slots, which balances the tiles; text goes where fewest are free.
        """
        free = self._shape.tiles - self._slots
        fits = self._open() & (self._columns + tokens <= self._shape.length)
        fits &= (free >= tiles)[:, None]
        pools = np.flatnonzero(fits.any(axis=1))
        if not len(pools):
            return None
        pool = pools[np.argmax(free[pools]) if tiles else np.argmin(free[pools])]
        row = np.argmax(np.where(fits[pool], self._columns[pool], -1))
        self._segments[pool, row] += 1
        found = Place(
            pool=int(pool),
            row=int(row),
            segment=int(self._segments[pool, row]),
            offset=int(self._columns[pool, row]),
            slot=int(self._slots[pool]),
        )
        self._columns[pool, row] += tokens
        self._slots[pool] += tiles
        return found

    @property
    def full(self) -> bool:
        """Whether no row can take another token."""
        return not (self._open() & (self._columns < self._shape.length)).any()

    def _open(self) -> np.ndarray:
        """bool[P, B]: rows that may take another sample."""
        return self._segments < self._shape.segments


class Item(Protocol):
    """What a packer packs: anything that carries a sample."""

    @property
    def sample(self) -> Sample: ...


T = TypeVar("T", bound=Item)


class Packer(Generic[T]):
    """Chooses the samples of each batch; those that do not fit wait and are tried first next time.

    Attributes:
      waiting: the items that wait, oldest first.
    """

    def __init__(self, shape: BatchShape, waiting: int = WAITING):
        """
        Args:
          waiting: how many may wait; a batch is complete when so many do, or when it is full.
        """
        self.waiting: list[T] = []
        self._shape, self._limit = shape, waiting

    def fill(self, stream: Iterator[T]) -> list[tuple[Place, T]]:
        """Places items into one batch: first those that wait, then new ones.

        The oldest that waits always finds room, so nothing waits for more batches than there are
        others before it.

        Args:
          stream: gives items whose samples passed `BatchShape.check`; it is read as far as needed.

        Returns:
          Items with their places, by pool, row and segment; [] when all came and went.
        """
        plan, placed = Plan(self._shape), []
        retried, self.waiting = self.waiting, []
        for item in retried:
            self._offer(plan, placed, item)
        while len(self.waiting) < self._limit and not plan.full:
            item = next(stream, None)
            if item is None:
                break
            self._offer(plan, placed, item)
        return sorted(placed, key=lambda pair: pair[0])

    def _offer(self, plan: Plan, placed: list[tuple[Place, T]], item: T) -> None:
        found = plan.add(len(item.sample), len(item.sample.tiles))
        if found is None:
            self.waiting.append(item)
        else:
            placed.append((found, item))


def assemble(
    placed: Sequence[tuple[Place, Sample]],
    shape: BatchShape,
    *,
    pad_id: int,
    tile_side: int,
    tokens_per_tile: int,
) -> Batch:
    """Writes samples at their places.

    Args:
      placed: places of one batch, as a `Packer` gives them, each with its sample.
      pad_id: token at padding.
      tile_side: S.
      tokens_per_tile: rows of the visual table per tile.

    Returns:
      A `Batch` of numpy arrays: tiles uint8[P, I, S, S, 3], tokens int32[P, B, T] and so on;
      `image_index` points into the table of the pool.
    """
    batch = empty_batch(
        shape.rows,
        shape.length,
        shape.tiles,
        pools=shape.pools,
        pad_id=pad_id,
        tile_side=tile_side,
    )
    pools = [jax.tree.map(lambda x, p=p: x[p], batch) for p in range(shape.pools)]
    for where, sample in placed:
        place(
            pools[where.pool],
            sample,
            row=where.row,
            slot=where.slot,
            tokens_per_tile=tokens_per_tile,
            offset=where.offset,
            segment=where.segment,
        )
    return batch


def supervised(batch: Batch) -> np.ndarray:
    """bool, shaped as the tokens: the targets that count; a sequence's first token is none."""
    return batch.loss_mask & (batch.segment_ids > 0) & (batch.positions > 0)
