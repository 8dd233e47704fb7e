"""The input pipeline: sources of rows to packed batches, resumable from a checkpoint (grain).

All stages before packing have random access, so the state of the pipeline is a few integers: the
position of the next row in the data order, and the positions of the samples that wait in the
packer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from vl2jax.common.errors import UserError, shown
from vl2jax.data.malformed import REPAIR, Malformed
from vl2jax.data.packing import BatchShape, Packer, assemble, supervised
from vl2jax.data.reading import BadRow, Reader, ReadRow, mixed_order
from vl2jax.data.row import Source
from vl2jax.data.unread import UnreadKeys
from vl2jax.processing.batch import Batch
from vl2jax.processing.processor import Processor

# Samples that each thread or worker process reads ahead.
READ_AHEAD = 8
# What `PackedBatch.pool_counts` counts.
BATCH_COUNTS = ("tokens", "images", "tiles", "supervised")
ROW_COUNTS = ("rows_read", "rows_skipped", "rows_too_long", "rows_truncated")
COUNTS = BATCH_COUNTS + ROW_COUNTS


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """A packed batch, with the origin of its samples and its counts.

    Attributes:
      batch: numpy arrays with a leading axis of pools, see `packing.assemble`.
      rows: int64[samples], position of each sample in the data order of all processes, sorted by
        pool, row and segment.  With the same settings they identify the batch.
      names: origin of each sample (file and row), as in messages.
      samples: number of samples.
      images: number of images.
      tiles: number of tiles.
      tokens: number of tokens without padding.
      supervised: number of tokens that count in the loss.
      pool_counts: int64[pools, `COUNTS`]; the first four are of each pool of the batch.  The others
        are counts of rows since the beginning of the run (see `malformed.Counts`), in the first
        pool.
    """

    batch: Batch
    rows: np.ndarray
    names: tuple[str, ...]
    samples: int
    images: int
    tiles: int
    tokens: int
    supervised: int
    pool_counts: np.ndarray


def make_pipeline(
    sources: Sequence[tuple[Source, float]],
    processor: Processor,
    shape: BatchShape,
    *,
    mask_prompt: bool,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    on_error: str = "raise",
    too_long: str = "raise",
    max_skipped: float = 0.5,
    on_skip: Callable[[str], None] | None = None,
    unread: UnreadKeys | None = None,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
    batches: int = 0,
) -> grain.IterDataset:
    """Makes a dataset that mixes, shuffles, reads and packs the rows of several sources.

    The state of its iterators (`get_state`, `set_state`) is a small JSON object.  An iterator that
    is restored from it produces the same batches bit for bit, for any threads, workers and
    prefetch.

    Args:
      sources: pairs of source and weight.  Without `repeat`, the sources are concatenated, each row
        is read once, and weights are ignored.
      processor: makes samples of rows.
      shape: shape of the batches of this process.
      mask_prompt: whether only answers are targets.
      seed: seed of the order; each source and each epoch is shuffled differently.
      shuffle: whether to shuffle the rows of each source.
      repeat: whether to repeat the sources forever; otherwise the last batch may be partly empty.
      on_error: "raise" raises a UserError for a malformed row, "skip" skips the row.
      too_long: what to do with a sample that does not fit into a batch: "raise" treats it as a
        malformed row, "skip" skips it, "truncate" cuts it at its end, see `limits.end_of_room`; a
        sample without supervised tokens in the rest is skipped.
      max_skipped: maximum share of skipped rows of a source, 0 to 1, see `malformed.Malformed`.
      on_skip: called once with each message about skipped rows, in a background thread.
      unread: says keys of rows that are not read, there too; None: says nothing.
      threads: threads that read rows, decode images and tokenize, in each worker process.
      workers: worker processes that do so; 0: only threads of this process.  With workers, sources
        must be picklable, and importing the program's main module must not run the program.
      prefetch: number of batches that a background thread prepares ahead.
      process_index: number of this process; it reads its share of each source.
      process_count: number of processes.
      batches: number of batches, the same for all processes: exactly so many come, and those after
        the end of the data are empty.  Nothing is read for others, except the samples that wait in
        the packer and at most one row of a batch for each of its rows.  0: until the data end.

    Returns:
      A dataset whose iterators produce `PackedBatch`es.  Close the iterators (`contextlib.closing`)
      before the program ends, to end their threads and processes.

    Raises:
      UserError: there is no source, a source is empty, or a setting is out of range.
    """
    weights = [float(weight) for _, weight in sources]
    opened = [source for source, _ in sources]
    _check_sources(opened, weights)
    _check_settings(on_error, too_long, seed, threads, workers, prefetch)
    if not 0 <= max_skipped <= 1:
        raise UserError(f"max_skipped is {max_skipped}, expected a share from 0 to 1")
    order = mixed_order(
        opened,
        weights,
        seed=seed,
        shuffle=shuffle,
        repeat=repeat,
        process_index=process_index,
        process_count=process_count,
    )
    dataset = PackedDataset(
        order.map_with_index(Reader(opened, processor, shape, mask_prompt, too_long)),
        shape,
        processor,
        threads=threads,
        workers=workers,
        padded=batches > 0,
        raises=on_error == "raise",
        on_skip=on_skip or _ignore,
        max_skipped=max_skipped,
        unread=unread or UnreadKeys(_ignore),
        identity={
            "seed": seed,
            "shuffle": shuffle,
            "repeat": repeat,
            "rows": list(map(len, opened)),
            "weights": weights,
            "process": [process_index, process_count],
        },
    )
    if batches:
        dataset = grain.experimental.LimitIterDataset(dataset, batches)
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)


class PackedDataset(grain.IterDataset):
    """Packs the samples of a random-access dataset of `ReadRow`s into batches.

    Attributes:
      samples: the dataset, in the data order.
      shape: shape of the batches.
      padded: whether empty batches come after the end of the data.
      raises: whether a malformed row is an error.
      on_skip: called with messages about skipped rows.
      max_skipped: maximum share of malformed rows of a source.
      unread: says keys of rows that are not read.
      identity: settings that determine the data order.
      assemble: makes a `Batch` of placed samples.
    """

    def __init__(
        self,
        samples: grain.MapDataset,
        shape: BatchShape,
        processor: Processor,
        *,
        threads: int,
        workers: int,
        padded: bool,
        raises: bool,
        on_skip: Callable[[str], None],
        max_skipped: float,
        unread: UnreadKeys,
        identity: dict[str, Any],
    ):
        """
        Args:
          samples: dataset of `ReadRow`s and `BadRow`s, in the data order.
          shape: shape of the batches.
          processor: has the padding id and the sizes of tiles.
          threads: threads that read ahead, in each worker process.
          workers: worker processes; 0: none.
          padded: whether empty batches come after the end of the data, without end; then samples
            are read ahead for one batch at most.
          raises: whether a malformed row is an error.
          on_skip: called with messages about skipped rows.
          max_skipped: maximum share of malformed rows of a source.
          unread: says keys of rows that are not read.
          identity: settings that determine the data order, as JSON values; a state with other
            settings is rejected.
        """
        super().__init__(samples)
        self.samples, self.shape, self.padded = samples, shape, padded
        self.raises, self.on_skip, self.max_skipped = raises, on_skip, max_skipped
        self.unread, self.identity = unread, identity
        self._threads, self._workers = threads, workers
        self.assemble = functools.partial(
            assemble,
            shape=shape,
            pad_id=processor.tokenizer.pad_id,
            tile_side=processor.config.vision.image_size,
            tokens_per_tile=processor.config.tokens_per_tile,
        )

    def __iter__(self) -> "PackedIterator":
        return PackedIterator(self)

    def read_from(self, index: int) -> grain.DatasetIterator:
        """Returns an iterator that reads ahead, starting at a position of the data order."""
        rows = self.shape.pools * self.shape.rows

        def bounded(count: int) -> int:
            return min(count, rows) if self.padded else count

        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=bounded(READ_AHEAD * self._threads)
        )
        ahead = self.samples[index:].to_iter_dataset(options)
        if self._workers:
            # Grain passes absl flags to its workers, which fails if they are not parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=bounded(READ_AHEAD)
            )
            ahead = ahead.mp_prefetch(options)
        return iter(ahead)


class PackedIterator(grain.DatasetIterator):
    """Produces `PackedBatch`es; its state is the next position and those of waiting samples."""

    _ahead: grain.DatasetIterator | None = None  # created by the first `__next__`

    def __init__(self, dataset: PackedDataset):
        super().__init__()
        self._dataset = dataset
        self._packer: Packer[ReadRow] = Packer(dataset.shape)
        self._next, self._ended = 0, False
        self._errors = Malformed(
            dataset.identity["rows"], dataset.identity["process"][1], dataset.max_skipped
        )

    def __next__(self) -> PackedBatch:
        if self._ahead is None:
            self._ahead = self._dataset.read_from(self._next)
        placed = [] if self._ended else self._packer.fill(self._good(self._ahead))
        if not placed:
            self._end()
        items = [item for _, item in placed]
        samples = [item.sample for item in items]
        batch = self._dataset.assemble([(place, item.sample) for place, item in placed])
        process_index, process_count = self._dataset.identity["process"]
        counts = np.zeros((self._dataset.shape.pools, len(COUNTS)), np.int64)
        for place, item in placed:
            sample = item.sample
            counts[place.pool, :3] += len(sample), len(sample.image_sizes), len(sample.tiles)
        counts[:, 3] = supervised(batch).sum(axis=(1, 2))
        counts[0, len(BATCH_COUNTS) :] = self._errors.counts.totals()
        tokens, images, tiles, targets = counts.sum(axis=0).tolist()[: len(BATCH_COUNTS)]
        return PackedBatch(
            batch=batch,
            rows=np.array([item.index * process_count + process_index for item in items], np.int64),
            names=tuple(item.where for item in items),
            samples=len(samples),
            images=images,
            tiles=tiles,
            tokens=tokens,
            supervised=targets,
            pool_counts=counts,
        )

    def get_state(self) -> dict[str, Any]:
        """Returns the state after the last batch, as JSON values."""
        waiting = [item.index for item in self._packer.waiting]
        return {
            "next": self._next,
            "waiting": waiting,
            "rows": self._errors.get_state(),
            "data": self._dataset.identity,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which the state was taken.

        Args:
          state: see `get_state`.

        Raises:
          UserError: the settings of the data differ from those of the state, or a row whose sample
            was waiting can no longer be read.
        """
        _check_identity(state["data"], self._dataset.identity)
        waiting = []
        for index in state["waiting"]:
            item = self._dataset.samples[index]
            if isinstance(item, BadRow):
                raise UserError(f"{item.error}; when the checkpoint was saved it could be read")
            waiting.append(item)
        self._stop_reading()
        self._next, self._packer.waiting, self._ended = state["next"], waiting, False
        self._errors.set_state(state.get("rows"), self._next > 0)

    def close(self) -> None:
        """Ends the threads and worker processes."""
        self._stop_reading()
        super().close()

    def _end(self) -> None:
        """Raises StopIteration, or UserError for bad data; returns if empty batches come."""
        self._ended = True
        _, process_count = self._dataset.identity["process"]
        if not self._dataset.padded or process_count == 1:  # others may have valid rows
            self._errors.end()
        if not self._dataset.padded:
            raise StopIteration

    def _stop_reading(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _good(self, ahead: Iterator[ReadRow | BadRow]) -> Iterator[ReadRow]:
        """Valid rows; malformed rows are raised or reported."""
        for item in ahead:
            self._next = item.index + 1
            if isinstance(item, BadRow):
                self._errors.add(item, self._dataset.on_skip, self._dataset.raises)
            else:
                self._errors.valid(item)
                if item.unread:
                    self._dataset.unread.add(item.file, item.unread)
                yield item


def _ignore(message: str) -> None:
    """Ignores a message."""


def _check_identity(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError if the state was saved with other settings of the data."""
    for name, value in current.items():
        if saved.get(name) != value:
            raise UserError(
                f"the data differs from the checkpoint's: {name} was {shown(saved.get(name))},"
                f" now {shown(value)}; restore it, or start in a new workdir with config.init_from"
            )


def _check_sources(sources: Sequence[Source], weights: Sequence[float]) -> None:
    """Raises UserError if there is no source, or one is empty or has a bad weight."""
    if not sources:
        raise UserError("there is no data source; name at least one in config.data")
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True), 1):
        if not len(source):
            raise UserError(f"data source {number} is empty; {REPAIR}")
        if not 0 < weight < math.inf:
            raise UserError(f"data source {number} has weight {weight}, expected more than 0")


def _check_settings(
    on_error: str, too_long: str, seed: int, threads: int, workers: int, prefetch: int
) -> None:
    """Raises UserError if a setting is out of range."""
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error is {on_error!r}, expected 'raise' or 'skip'")
    if too_long not in ("raise", "skip", "truncate"):
        raise UserError(f"too_long is {too_long!r}, expected 'raise', 'skip' or 'truncate'")
    for name, value, least in (
        ("seed", seed, 0),
        ("threads", threads, 1),
        ("workers", workers, 0),
        ("prefetch", prefetch, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}, expected {least} or more")
