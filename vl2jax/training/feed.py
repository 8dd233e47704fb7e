"""From packed batches to arrays on a mesh: which process reads what, and where its rows go.

The mesh splits a batch into equal parts, and each part is one or more pools: rows with tile slots
of their own. The data is divided into data shards; each is read and packed by itself and fills
equally many pools, over which its packer balances the tiles. A process reads the data shards that
its devices need, so what a step gets depends on the numbers of data shards and pools, which a
checkpoint keeps, and not on processes, nor on the mesh as long as its parts divide the pools.

Axis legend: P microbatches, G pools, B rows of a pool.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vl2jax.common.errors import UserError
from vl2jax.data.pipeline import PackedBatch
from vl2jax.parallel.mesh import batch_shards
from vl2jax.parallel.sharding import batch_sharding
from vl2jax.processing.batch import Batch
from vl2jax.training.run_config import BatchConfig

# What is counted of each pool, and summed over all processes with the step.
COUNTED = ("tokens", "images", "tiles", "supervised", "stop")


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """The batch of a step.

    Attributes:
      batch: arrays on the mesh, [P, G * B, ...].
      packed: what this process read, by data shard.
      totals: float32 by name of `COUNTED`, over all processes, and "tile_imbalance": by how much
        the fullest part exceeds the mean; on the device, there when the step is.
    """

    batch: Batch
    packed: Mapping[int, PackedBatch]
    totals: Mapping[str, jax.Array]


class Feed:
    """An iterable over the batches of a run; every iterator begins anew."""

    def __init__(
        self,
        mesh: Mesh,
        pools: int,
        shards: int,
        pipeline: Callable[[int], grain.IterDataset],
    ):
        """
        Args:
          mesh: that the batch is split over.
          pools: G, a multiple of the parts of the batch and of the data shards.
          shards: data shards.
          pipeline: of a data shard, from its number; its batches have G / shards pools for each
            microbatch.
        """
        self.mesh, self.pools, self.shards = mesh, pools, shards
        self.mine = _own_pools(mesh, pools)
        wanted = sorted({pool // (pools // shards) for pool in self.mine})
        self.pipelines = {number: pipeline(number) for number in wanted}

    def __iter__(self) -> "FeedIterator":
        return FeedIterator(self)


class FeedIterator(Iterator[DeviceBatch]):
    """See `Feed`; its state holds that of every data shard, also of other processes."""

    def __init__(self, feed: Feed):
        self._feed = feed
        self._iterators = {number: iter(data) for number, data in feed.pipelines.items()}
        self._sharding = batch_sharding(feed.mesh)
        self._total = jax.jit(
            functools.partial(_total, batch_shards(feed.mesh)),
            out_shardings=NamedSharding(feed.mesh, PartitionSpec()),
        )
        self.stopping = False  # asks, with the next batch, that all processes stop

    def __next__(self) -> DeviceBatch:
        packed = {number: next(iterator) for number, iterator in self._iterators.items()}
        each = self._feed.pools // self._feed.shards  # pools of a data shard
        local: dict[int, Batch] = {}
        counts: dict[int, np.ndarray] = {}
        for number, one in packed.items():
            split = jax.tree.map(lambda x: x.reshape(-1, each, *x.shape[1:]), one.batch)
            counted = one.pool_counts.reshape(-1, each, one.pool_counts.shape[-1])
            for i in range(each):
                pool = number * each + i
                if pool in self._feed.mine:
                    local[pool] = jax.tree.map(lambda x, i=i: x[:, i], split)
                    stop = np.full((len(counted), 1), self.stopping)
                    counts[pool] = np.concatenate([counted[:, i], stop], axis=1)[:, None]
        batch = jax.tree.map(
            lambda *pools: self._place(dict(zip(local, pools, strict=True))), *local.values()
        )
        return DeviceBatch(batch, packed, self._total(self._place(counts)))

    def _place(self, pools: dict[int, np.ndarray]) -> jax.Array:
        """An array on the mesh from this process's pools, [P, B, ...] each."""
        one = next(iter(pools.values()))
        rows = one.shape[1]
        shape = (one.shape[0], rows * self._feed.pools, *one.shape[2:])

        def of(index: Any) -> np.ndarray:  # a slice for each axis
            if not rows:
                return one
            first, last, _ = index[1].indices(shape[1])
            return np.concatenate([pools[i] for i in range(first // rows, last // rows)], axis=1)

        return jax.make_array_from_callback(shape, self._sharding, of)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes, fit for JSON; all processes ask for it together."""
        own = {number: it.get_state() for number, it in self._iterators.items()}
        if jax.process_count() > 1 and self._feed.shards > 1:
            own = _of_all_processes(own)
        return {"pools": self._feed.pools, "shards": [own[number] for number in sorted(own)]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch that the state was taken after."""
        for number, iterator in self._iterators.items():
            iterator.set_state(state["shards"][number])

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        with contextlib.ExitStack() as stack:
            for iterator in self._iterators.values():
                stack.callback(iterator.close)


def fill_metrics(device_batch: DeviceBatch) -> dict[str, float]:
    """Shares of the token and tile slots that are used, from 0 to 1, and how uneven the tiles are:
    by how much the fullest part of the batch exceeds the mean."""
    slots = math.prod(device_batch.batch.tiles.shape[:2])
    return {
        "data/token_fill": float(device_batch.totals["tokens"]) / device_batch.batch.tokens.size,
        "data/tile_fill": float(device_batch.totals["tiles"]) / slots if slots else 1.0,
        "data/tile_imbalance": float(device_batch.totals["tile_imbalance"]),
    }


def choose_pools(
    mesh: Mesh, batch: BatchConfig, wanted: int, saved: Mapping[str, Any] | None
) -> tuple[int, int]:
    """How many pools a batch has, and how many shards the data.

    Args:
      mesh: that the batch is split over.
      batch: its shape.
      wanted: data shards; 0: as a saved state has, or one per process as far as the mesh allows.
      saved: state of the data to go on from, or None. Its pools are kept where they can be, and
        with them the very batches.

    Raises:
      UserError: the batch does not divide, or the saved state has other data shards.
    """
    parts, per = batch_shards(mesh), batch.microbatches
    shards = len(saved["shards"]) if saved else wanted or math.gcd(parts, jax.process_count())
    if wanted and wanted != shards:
        raise UserError(
            f"data.shards is {wanted}, but the checkpoint's data is in {shards} shards; leave it 0"
            " or begin in a new workdir with init_from"
        )
    least = math.lcm(parts, shards)
    for pools in (math.lcm(least, saved["pools"] if saved else 1), least):
        if batch.rows % (per * pools) == 0 and batch.tiles % (per * pools) == 0:
            return pools, shards
    raise UserError(
        f"{shards} data shards on {parts} parts of the batch (mesh data x fsdp x expert) need"
        f" batch.rows and batch.tiles that are multiples of {per * least} ({per} microbatches), got"
        f" {batch.rows} and {batch.tiles}"
    )


def _own_pools(mesh: Mesh, pools: int) -> frozenset[int]:
    """The pools that devices of this process hold."""
    places = batch_sharding(mesh).addressable_devices_indices_map((1, pools))
    indices = [index for index in places.values() if index is not None]
    return frozenset(i for index in indices for i in range(*index[1].indices(pools)))


def _total(parts: int, counts: jax.Array) -> dict[str, jax.Array]:
    """Sums of int[P, G, `COUNTED`], and the imbalance of the tiles between parts of the batch."""
    counts = counts.astype(jnp.float32)
    tiles = counts[..., COUNTED.index("tiles")].reshape(len(counts), parts, -1).sum(axis=-1)
    mean = jnp.maximum(tiles.mean(axis=1).sum(), 1e-9)
    sums = dict(zip(COUNTED, counts.sum(axis=(0, 1)), strict=True))
    return sums | {"tile_imbalance": jnp.maximum(tiles.max(axis=1).sum() / mean - 1, 0)}


def _of_all_processes(own: Mapping[int, Any]) -> dict[int, Any]:
    """What all processes have, by number."""
    text = np.frombuffer(json.dumps(list(own.items())).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(text)], np.int32)).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    found: dict[int, Any] = {}
    for row, length in zip(rows, lengths, strict=True):
        found |= dict(json.loads(bytes(row[:length]).decode()))
    return found
