"""The data order: the rows of several sources as one dataset of samples with random access.

A position in the data order always gives the same sample, in any thread or process.  So one integer
is enough to resume.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from vl2jax.common.errors import UserError, clip
from vl2jax.data.packing import BatchShape
from vl2jax.data.row import Source
from vl2jax.data.samples import read_sample
from vl2jax.processing.collate import Sample
from vl2jax.processing.limits import Limits, TooLong
from vl2jax.processing.processor import Processor


@dataclasses.dataclass(frozen=True)
class ReadRow:
    """A row that was read.

    Attributes:
      index: its position in the data order.
      source: number of its source.
      where: its name in messages.
      sample: its sample.
      file, unread: see `Row`.
    """

    index: int
    source: int
    where: str
    sample: Sample
    file: str = ""
    unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A malformed row.

    Attributes:
      index: its position in the data order.
      source: number of its source.
      error: the error message.
      too_long: whether it is only too long for the batch.
      skip: whether it is skipped even if malformed rows end the run.
    """

    index: int
    source: int
    error: str
    too_long: bool = False
    skip: bool = False


class Reader:
    """Reads the row at a position of the data order, and makes a sample of it."""

    def __init__(
        self,
        sources: Sequence[Source],
        processor: Processor,
        shape: BatchShape,
        mask_prompt: bool,
        too_long: str,
    ):
        self._sources, self._processor = sources, processor
        self._mask_prompt, self._too_long = mask_prompt, too_long
        truncate = too_long == "truncate"
        self._limits = Limits(shape.length, shape.tiles, truncate, shape.check)

    def __call__(self, index: int, place: tuple[int, int]) -> ReadRow | BadRow:
        source, number = place
        try:
            row = self._sources[source][number]
            options: Any = {"mask_prompt": self._mask_prompt, "limits": self._limits}
            sample = read_sample(row, self._processor, **options)
        except UserError as error:
            # Returned, not raised, so that it reaches the packer in order from any thread or
            # process.
            too_long = isinstance(error, TooLong)
            skip = too_long and self._too_long != "raise"
            return BadRow(index, source, clip(str(error), 1000), too_long, skip)
        return ReadRow(index, source, row.where, sample, row.file, row.unread)


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
    """Makes the data order of one process.

    Each source is shuffled (unless it is `ordered`), repeated, and split among the processes.  Then
    the sources are mixed, so that all processes have the same mixture.

    Args:
      sources: the sources.
      weights: weight of each source in the mixture.
      seed: seed of shuffling; each source and each epoch is shuffled differently.
      shuffle: whether to shuffle.
      repeat: whether to repeat the sources forever; otherwise they are concatenated, not mixed.
      process_index: number of this process.
      process_count: number of processes.

    Returns:
      A dataset of (number of the source, number of the row).
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
