"""Rows of several sources as one long order with random access: which row a number is, as a sample.

Whatever reads the order, in whatever threads and processes, gets the same sample for a number; so
a place in the data is one integer.
"""

import dataclasses
import functools
from collections.abc import Sequence

import grain
import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.data.packing import BatchShape
from vl2jax.data.row import Row, Source
from vl2jax.data.samples import read_sample
from vl2jax.processing.collate import Sample
from vl2jax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class ReadRow:
    """A row that was read.

    Attributes:
      index: its number in the order.
      source: number of its source.
      where: how messages name it.
    """

    index: int
    source: int
    where: str
    sample: Sample


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A malformed row: its number in the order, that of its source, and what is wrong with it."""

    index: int
    source: int
    error: str


class Reader:
    """Makes a number of the order, and the source and row that lie there, into a `ReadRow`."""

    def __init__(
        self,
        sources: Sequence[Source],
        processor: Processor,
        shape: BatchShape,
        mask_prompt: bool,
    ):
        self._sources, self._processor = sources, processor
        self._shape, self._mask_prompt = shape, mask_prompt

    def __call__(self, index: int, place: tuple[int, int]) -> ReadRow | BadRow:
        source, number = place
        try:
            row = self._sources[source][number]
            sample = self._sample(row)
        except UserError as error:
            # As a value: it reaches the packer in its turn, from threads and processes alike.
            return BadRow(index, source, str(error))
        return ReadRow(index, source, row.where, sample)

    def _sample(self, row: Row) -> Sample:
        sample = read_sample(row, self._processor, mask_prompt=self._mask_prompt)
        try:
            self._shape.check(sample)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        return sample


def mixed_order(
    sources: Sequence[Source],
    weights: Sequence[float],
    *,
    seed: int,
    shuffle: bool,
    repeat: bool,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """(number of the source, number of the row), by number of this process's order.

    Each source is shuffled anew in each epoch, unless it says `ordered`, and divided among
    processes before it is mixed, so that all processes see the same mixture. Without `repeat`
    sources follow one another.
    """
    parts = []
    for number, source in enumerate(sources):
        part = grain.MapDataset.range(len(source))
        if shuffle and not getattr(source, "ordered", False):
            own_seed = np.random.SeedSequence((seed, number)).generate_state(1)[0]
            part = part.shuffle(seed=int(own_seed))
        if repeat:
            part = part.repeat()
        part = part[process_index::process_count]
        parts.append(part.map(functools.partial(_pair, number)))
    if len(parts) == 1:
        return parts[0]
    if repeat:
        return grain.MapDataset.mix(parts, weights)
    return grain.MapDataset.concatenate(parts)


def _pair(source: int, number: int) -> tuple[int, int]:
    return source, number
