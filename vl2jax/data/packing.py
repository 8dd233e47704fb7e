"""Packing: puts several samples into each row of a batch, within its budgets of tokens and tiles.

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
from vl2jax.processing.limits import TooLong

# Maximum number of samples that wait for the next batch because they did not fit into the current
# one.  More of them fill batches better, but the tiles of each are kept in memory.
WAITING = 32


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Shape of a batch, which is its budget of tokens and tiles.

    Attributes:
      pools: P, number of groups of rows that have their own tile slots: one for each part into
        which the mesh splits each microbatch.
      rows: B, rows of a pool.
      length: T, tokens of a row.
      tiles: I, tile slots of a pool, which its rows share.
      segments: maximum number of samples in a row; 1 turns packing off.

    Raises:
      UserError: a value is too small.
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

    def check(self, tokens: int, tiles: int) -> None:
        """Raises TooLong if a sample does not fit into an empty batch of this shape.

        Args:
          tokens: number of its tokens.
          tiles: number of its tiles.
        """
        if tokens > self.length:
            raise TooLong(
                f"the sample has {tokens} tokens, but a row only {self.length}: raise"
                f" config.batch.length to {tokens}, shorten the sample, or set"
                " config.data.too_long to 'skip' or 'truncate'"
            )
        if tiles > self.tiles:
            raise TooLong(
                f"the sample has {tiles} tiles, but a part of the batch only {self.tiles} slots:"
                f" raise config.batch.tiles to {tiles} for each part, give fewer images, or set"
                " config.data.too_long to 'skip' or 'truncate'"
            )


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Place of a sample in a batch.

    Attributes:
      pool: its pool.
      row: its row in the pool.
      segment: its segment id, from 1.
      offset: the first of its columns.
      slot: the first of its tile slots.
    """

    pool: int
    row: int
    segment: int
    offset: int
    slot: int


class Plan:
    """Assigns places in one batch to samples, and tracks the remaining budgets."""

    def __init__(self, shape: BatchShape):
        self._shape = shape
        self._columns = np.zeros((shape.pools, shape.rows), np.int64)  # used columns of each row
        self._segments = np.zeros((shape.pools, shape.rows), np.int64)
        self._slots = np.zeros(shape.pools, np.int64)  # used tile slots of each pool

    def add(self, tokens: int, tiles: int) -> Place | None:
        """Reserves a place for a sample.

        A sample with images is placed in the pool with the most free tile slots, which balances the
        tiles; a sample without, in the pool with the fewest.  In the pool, the sample is placed in
        the fullest row into which it fits (best fit).

        Args:
          tokens: number of its tokens.
          tiles: number of its tiles.

        Returns:
          The place; None if the sample does not fit.
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
        """Whether no row has room for another token."""
        return not (self._open() & (self._columns < self._shape.length)).any()

    def _open(self) -> np.ndarray:
        """bool[P, B]: rows with fewer than the maximum number of samples."""
        return self._segments < self._shape.segments


class Item(Protocol):
    """An item for the packer: an object with a sample."""

    @property
    def sample(self) -> Sample: ...


T = TypeVar("T", bound=Item)


class Packer(Generic[T]):
    """Chooses the samples of each batch.

    Items that do not fit wait, and are the first to be placed in the next batch.

    Attributes:
      waiting: the waiting items, oldest first.
    """

    def __init__(self, shape: BatchShape, waiting: int = WAITING):
        """Makes a packer without waiting items.

        Args:
          shape: shape of the batches.
          waiting: maximum number of waiting items; a batch is complete when it is reached, or when
            all rows are full.
        """
        self.waiting: list[T] = []
        self._shape, self._limit = shape, waiting

    def fill(self, stream: Iterator[T]) -> list[tuple[Place, T]]:
        """Fills one batch, first with waiting items, then with new ones.

        The oldest waiting item always fits, so an item waits for at most as many batches as items
        were waiting before it.

        Args:
          stream: items whose samples passed `BatchShape.check`; read as far as needed.

        Returns:
          Places and items, sorted by pool, row and segment; [] if there are no more items.
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
    """Makes a batch of samples and their places.

    Args:
      placed: the places in one batch, as a `Packer` returns them, each with its sample.
      shape: shape of the batch.
      pad_id: token id of padding.
      tile_side: S.
      tokens_per_tile: visual tokens per tile.

    Returns:
      A `Batch` of numpy arrays: tiles uint8[P, I, S, S, 3], the other fields [P, B, T].
      `image_index` refers to the tiles of the same pool.
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
    """Returns which tokens count in the loss: targets except the first token of a sequence.

    Args:
      batch: numpy arrays, of any leading axes.

    Returns:
      bool, in the shape of `batch.tokens`.
    """
    return batch.loss_mask & (batch.segment_ids > 0) & (batch.positions > 0)
