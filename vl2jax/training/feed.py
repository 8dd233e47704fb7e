"""Turns packed batches into arrays on a mesh, and decides which process reads which data.

The mesh splits each microbatch into equal parts, and each part consists of one or more pools.  A
pool is a group of rows with its own tile slots.  The data is split into data shards.  Each shard is
read and packed independently and fills the same number of pools; its packer balances the tiles over
these pools.  Each process reads the data shards that its devices need.  The content of a batch
therefore depends on the numbers of data shards and pools, which a checkpoint keeps.  It does not
depend on the number of processes, nor on the mesh, as long as the number of pools is a multiple of
its parts.

Axis legend: P microbatches, G pools, B rows of a pool.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vl2jax.common.errors import UserError
from vl2jax.data.pipeline import COUNTS, PackedBatch
from vl2jax.parallel.mesh import batch_shards
from vl2jax.parallel.sharding import batch_sharding
from vl2jax.processing.batch import Batch
from vl2jax.training.run_config import BatchConfig

# Counts of each pool.  The devices sum them over all processes.
COUNTED = (*COUNTS, "stop")
# Batches that each of several processes reads ahead, see `FeedIterator`.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """The batch of one step.

    Attributes:
      batch: arrays on the mesh, [P, G * B, ...].
      packed: batches that this process read, by number of the data shard.
      totals: float32[] for each name in `COUNTED`, summed over all processes, and
        "tile_imbalance": tiles of the fullest part of the batch / mean tiles of a part - 1.  The
        arrays are on the device; the host does not wait for them.  `rows_read`, `rows_skipped`,
        `rows_too_long` and `rows_truncated` count from the beginning of the run, also after a
        restart.
      number: number of the batch in the order of the data, from 1.
      after: states, after this batch, of the data shards that this process reads.
    """

    batch: Batch
    packed: Mapping[int, PackedBatch]
    totals: Mapping[str, jax.Array]
    number: int
    after: Mapping[int, Any]


class Feed:
    """An iterable over the batches of a run; each iterator starts from the beginning.

    Attributes:
      mesh: mesh over which the batches are sharded.
      pools: G.
      shards: number of data shards.
      mine: the pools that devices of this process hold.
      pipelines: the data shards that this process reads, by number.
      ends: whether the iteration ends at a batch that is empty on all processes.
    """

    def __init__(
        self,
        mesh: Mesh,
        pools: int,
        shards: int,
        pipeline: Callable[[int], grain.IterDataset],
        ends: bool = False,
        passed_over: Sequence[range] = (),
        on_skip: Callable[[str], None] | None = None,
    ):
        """
        Args:
          mesh: mesh over which the batches are sharded.
          pools: G, a multiple of the number of parts of a batch and of the number of data shards.
          shards: number of data shards.
          pipeline: returns the pipeline of a data shard, given its number.  Its batches have
            G / shards pools per microbatch.  All data shards must give equally many batches.
          ends: whether to end at a batch that is empty on all processes.  Then each batch waits for
            the devices.
          passed_over: numbers of batches that are read and not given.
          on_skip: called with a message for each of them.
        """
        self.passed_over, self.on_skip = passed_over, on_skip
        self.mesh, self.pools, self.shards, self.ends = mesh, pools, shards, ends
        self.mine = _own_pools(mesh, pools)
        wanted = sorted({pool // (pools // shards) for pool in self.mine})
        self.pipelines = {number: pipeline(number) for number in wanted}

    def __iter__(self) -> "FeedIterator":
        return FeedIterator(self)


class FeedIterator(Iterator[DeviceBatch]):
    """Iterator of a `Feed`.

    Several processes stop together, also when one of them cannot read on.  So each reads two
    batches ahead.  When it fails, it asks all processes to stop, with the last two batches that it
    has.  They learn of it when the step of the first one is done, and stop after that of the
    second.  The first batches are compared before any is given.

    Attributes:
      stopping: set it to True to ask all processes, with the next batch, to stop.
      failure: the error for which this process has no further batches; None: there is none.
    """

    def __init__(self, feed: Feed):
        self._feed = feed
        self._iterators = {number: iter(data) for number, data in feed.pipelines.items()}
        self._sharding = batch_sharding(feed.mesh)
        self._total = jax.jit(
            functools.partial(_total, batch_shards(feed.mesh)),
            out_shardings=NamedSharding(feed.mesh, PartitionSpec()),
        )
        # Batches of this process that were read: number, batch, states of the shards after it.
        self._ahead: collections.deque[tuple[int, dict[int, PackedBatch], dict[int, Any]]]
        self._ahead = collections.deque()
        self._number = 0  # of the last batch that was read
        self._started = self._ended = self.stopping = False
        self.failure: Exception | None = None

    def __next__(self) -> DeviceBatch:
        self.read()
        if not self._started:
            self._started = True
            _assert_all_can_read(self.failure)
        if not self._ahead:
            raise self.failure or StopIteration
        number_of_batch, packed, after = self._ahead.popleft()
        each = self._feed.pools // self._feed.shards  # pools per data shard
        local: dict[int, Batch] = {}
        counts: dict[int, np.ndarray] = {}
        asking = self.stopping or self.failure is not None
        for number, one in packed.items():
            split = jax.tree.map(lambda x: x.reshape(len(x) // each, each, *x.shape[1:]), one.batch)
            counted = one.pool_counts.reshape(-1, each, one.pool_counts.shape[-1])
            for i in range(each):
                pool = number * each + i
                if pool in self._feed.mine:
                    local[pool] = jax.tree.map(lambda x, i=i: x[:, i], split)
                    stop = np.full((len(counted), 1), asking)
                    counts[pool] = np.concatenate([counted[:, i], stop], axis=1)[:, None]
        batch = jax.tree.map(
            lambda *pools: self._place(dict(zip(local, pools, strict=True))), *local.values()
        )
        totals = self._total(self._place(counts))
        if self._feed.ends and not float(totals["tokens"]):
            raise StopIteration
        return DeviceBatch(batch, packed, totals, number_of_batch, after)

    def read(self) -> bool:
        """Reads the next batch, so that `next` does not wait for data; it raises no error of them.

        Several processes read further ones, too.

        Returns:
          True.
        """
        wanted = 1 if jax.process_count() == 1 else 1 + _AHEAD
        while len(self._ahead) < wanted and not self._ended:
            try:
                packed = {number: next(iterator) for number, iterator in self._iterators.items()}
            except StopIteration:
                self._ended = True
            except Exception as error:  # raised when the batches before it are given
                self.failure, self._ended = error, True
            else:
                self._number += 1
                if any(self._number in span for span in self._feed.passed_over):
                    self._pass_over(packed)
                    continue
                after = {number: it.get_state() for number, it in self._iterators.items()}
                self._ahead.append((self._number, packed, after))
        return True

    def _pass_over(self, packed: Mapping[int, PackedBatch]) -> None:
        if self._feed.on_skip is not None:
            rows = ", ".join(one.names[0] for one in packed.values() if one.names)
            self._feed.on_skip(f"batch {self._number} ({rows}, ...), see config.data.skip_batches")

    def _place(self, pools: dict[int, np.ndarray]) -> jax.Array:
        """Makes an array on the mesh from the pools of this process, [P, B, ...] each."""
        one = next(iter(pools.values()))
        rows = one.shape[1]
        shape = (one.shape[0], rows * self._feed.pools, *one.shape[2:])

        def shard(index: Any) -> np.ndarray:  # index: one slice per axis
            if not rows:
                return one
            first, last, _ = index[1].indices(shape[1])
            return np.concatenate([pools[i] for i in range(first // rows, last // rows)], axis=1)

        return jax.make_array_from_callback(shape, self._sharding, shard)

    def get_state(self, device_batch: DeviceBatch) -> dict[str, Any]:
        """Returns the state after a batch, as JSON; all processes must call it together."""
        own = dict(device_batch.after)
        if jax.process_count() > 1 and self._feed.shards > 1:
            own = _of_all_processes(own)
        shards = [own[number] for number in sorted(own)]
        return {"pools": self._feed.pools, "shards": shards, "batches": device_batch.number}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch of a state; call it before the first batch is taken.

        Args:
          state: see `get_state`.
        """
        self._number = state["batches"]
        for number, iterator in self._iterators.items():
            iterator.set_state(state["shards"][number])

    def close(self) -> None:
        """Stops the threads and processes that prefetch data."""
        with contextlib.ExitStack() as stack:
            for iterator in self._iterators.values():
                stack.callback(_close, iterator)


def _close(iterator: Any) -> None:
    """Closes an iterator of a pipeline, also if a signal interrupted the start of its thread."""
    try:
        iterator.close()
    except RuntimeError as error:
        if "before it is started" not in str(error):
            raise


def fill_metrics(device_batch: DeviceBatch) -> dict[str, float]:
    """Metrics of the reading and packing of a batch.

    Returns:
      `data/skipped`, `data/too_long` and `data/truncated`: rows since the beginning of the run, of
      all processes; `data/skipped_share`: skipped rows / read rows, 0 to 1.
      `data/token_fill` and `data/tile_fill`: used fraction of the token and tile slots, 0 to 1.
      `data/tile_imbalance`: see `DeviceBatch.totals`.
    """
    slots = math.prod(device_batch.batch.tiles.shape[:2])
    totals = {name: float(value) for name, value in device_batch.totals.items()}
    return {
        "data/skipped": totals["rows_skipped"],
        "data/skipped_share": totals["rows_skipped"] / max(totals["rows_read"], 1.0),
        "data/too_long": totals["rows_too_long"],
        "data/truncated": totals["rows_truncated"],
        "data/token_fill": totals["tokens"] / device_batch.batch.tokens.size,
        "data/tile_fill": totals["tiles"] / slots if slots else 1.0,
        "data/tile_imbalance": totals["tile_imbalance"],
    }


def choose_pools(
    mesh: Mesh, batch: BatchConfig, wanted: int, saved: Mapping[str, Any] | None
) -> tuple[int, int]:
    """Chooses the numbers of pools and data shards of a run.

    Args:
      mesh: mesh over which the batch is sharded.
      batch: shape of the batch.
      wanted: number of data shards; 0: that of the saved state, or without one the greatest common
        divisor of the number of processes and the parts of the batch.
      saved: saved state of the data, to resume from; None: a new run.  If possible, its number of
        pools is kept, so that the run gets the same batches.

    Returns:
      The number of pools of a microbatch, and the number of data shards.

    Raises:
      UserError: the pools do not divide the batch, or the saved state has another number of data
        shards than `wanted`.
    """
    parts, per = batch_shards(mesh), batch.microbatches
    shards = len(saved["shards"]) if saved else wanted or math.gcd(parts, jax.process_count())
    if wanted and wanted != shards:
        raise UserError(
            f"data.shards is {wanted}, but the checkpoint was saved with {shards} data shards; set"
            " it to 0, or start in a new workdir with init_from"
        )
    least = math.lcm(parts, shards)
    for pools in (math.lcm(least, saved["pools"] if saved else 1), least):
        if batch.rows % (per * pools) == 0 and batch.tiles % (per * pools) == 0:
            return pools, shards
    raise UserError(
        f"batch.rows and batch.tiles must be multiples of {per * least} for {per} microbatches,"
        f" {shards} data shards and {parts} parts of the batch (mesh data x fsdp x expert), got"
        f" {batch.rows} and {batch.tiles}"
    )


def _own_pools(mesh: Mesh, pools: int) -> frozenset[int]:
    """Numbers of the pools that devices of this process hold."""
    places = batch_sharding(mesh).addressable_devices_indices_map((1, pools))
    indices = [index for index in places.values() if index is not None]
    return frozenset(i for index in indices for i in range(*index[1].indices(pools)))


def _total(parts: int, counts: jax.Array) -> dict[str, jax.Array]:
    """Sums counts int[P, G, `COUNTED`] and computes the imbalance of tiles between parts."""
    counts = counts.astype(jnp.float32)
    tiles = counts[..., COUNTED.index("tiles")].reshape(len(counts), parts, -1).sum(axis=-1)
    mean = jnp.maximum(tiles.mean(axis=1).sum(), 1e-9)
    sums = dict(zip(COUNTED, counts.sum(axis=(0, 1)), strict=True))
    return sums | {"tile_imbalance": jnp.maximum(tiles.max(axis=1).sum() / mean - 1, 0)}


def _assert_all_can_read(failure: Exception | None) -> None:
    """Raises the error of this process; UserError if another one failed.  All must call it."""
    failed = [failure is not None]
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(failed)).reshape(-1).tolist()
    if failure is not None:
        raise failure
    if any(failed):
        raise UserError(
            f"process {failed.index(True)} cannot read its data; its own output has the reason"
        )


def _of_all_processes(own: Mapping[int, Any]) -> dict[int, Any]:
    """Gathers the entries of all processes on every process."""
    text = np.frombuffer(json.dumps(list(own.items())).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    found: dict[int, Any] = {}
    for row, length in zip(rows, lengths, strict=True):
        found |= dict(json.loads(bytes(row[:length]).decode()))
    return found
