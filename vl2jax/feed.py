"""From packed batches to arrays on a mesh: which process reads what, and where its rows go.

The batch has a part for each of the mesh's batch shards, with tile slots of its own. The data is
divided into data shards; each is read and packed by itself and fills equally many parts, over which
its packer balances the tiles. A process reads the data shards that its devices need, so what a step
gets depends on the number of data shards and not on that of processes.

Axis legend: P microbatches, G parts of the batch, B rows of a part.
"""

import contextlib
import dataclasses
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

from vl2jax.ambient import batch_shards
from vl2jax.batch import Batch
from vl2jax.data.pipeline import PackedBatch
from vl2jax.errors import UserError
from vl2jax.sharding import batch_sharding

# What is counted of each part of the batch, and summed over all processes with the step.
COUNTED = ("tokens", "images", "tiles", "supervised", "stop")


@dataclasses.dataclass(frozen=True)
class Fed:
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
        microbatches: int,
        shards: int,
        pipeline: Callable[[int], grain.IterDataset],
    ):
        """
        Args:
          mesh: that the batch is split over.
          microbatches: P.
          shards: data shards; must divide the parts of the batch (`check_shards`).
          pipeline: of a data shard, from its number; batches of P * G / shards pools.
        """
        self.mesh, self.microbatches, self.shards = mesh, microbatches, shards
        self.parts = batch_shards(mesh)
        self.mine = _own_parts(mesh)
        wanted = sorted({part // (self.parts // shards) for part in self.mine})
        self.pipelines = {number: pipeline(number) for number in wanted}

    def __iter__(self) -> "FeedIterator":
        return FeedIterator(self)


class FeedIterator(Iterator[Fed]):
    """See `Feed`; its state holds that of every data shard, also of other processes."""

    def __init__(self, feed: Feed):
        self._feed = feed
        self._iterators = {number: iter(data) for number, data in feed.pipelines.items()}
        self._sharding = batch_sharding(feed.mesh)
        self._total = jax.jit(
            _total, out_shardings=NamedSharding(feed.mesh, PartitionSpec())
        )  # one program for the whole run
        self.stopping = False  # asks, with the next batch, that all processes stop

    def __next__(self) -> Fed:
        packed = {number: next(iterator) for number, iterator in self._iterators.items()}
        parts = self._feed.parts // self._feed.shards  # of a data shard
        local: dict[int, Batch] = {}
        counts: dict[int, np.ndarray] = {}
        for number, one in packed.items():
            split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]), one.batch)
            counted = one.pool_counts.reshape(-1, parts, one.pool_counts.shape[-1])
            for i in range(parts):
                part = number * parts + i
                if part in self._feed.mine:
                    local[part] = jax.tree.map(lambda x, i=i: x[:, i], split)
                    stop = np.full((len(counted), 1), self.stopping)
                    counts[part] = np.concatenate([counted[:, i], stop], axis=1)[:, None]
        batch = jax.tree.map(
            lambda *parts: self._place(dict(zip(local, parts, strict=True))), *local.values()
        )
        return Fed(batch, packed, self._total(self._place(counts)))

    def _place(self, parts: dict[int, np.ndarray]) -> jax.Array:
        """An array on the mesh from this process's parts, [P, B, ...] each."""
        one = next(iter(parts.values()))
        rows = one.shape[1]
        shape = (one.shape[0], rows * self._feed.parts, *one.shape[2:])

        def of(index: tuple[slice, ...]) -> np.ndarray:
            return parts[(index[1].start or 0) // rows] if rows else one

        return jax.make_array_from_callback(shape, self._sharding, of)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes, fit for JSON; all processes ask for it together."""
        own = {number: it.get_state() for number, it in self._iterators.items()}
        if jax.process_count() > 1 and self._feed.shards > 1:
            own = _of_all_processes(own)
        return {"shards": [own[number] for number in sorted(own)]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch that the state was taken after."""
        for number, iterator in self._iterators.items():
            iterator.set_state(state["shards"][number])

    def close(self) -> None:
        """Ends the threads and processes that read ahead."""
        with contextlib.ExitStack() as stack:
            for iterator in self._iterators.values():
                stack.callback(iterator.close)


def fill_metrics(fed: Fed) -> dict[str, float]:
    """Shares of the token and tile slots that are used, from 0 to 1, and how uneven the tiles are:
    by how much the fullest part of the batch exceeds the mean."""
    slots = math.prod(fed.batch.tiles.shape[:2])
    return {
        "data/token_fill": float(fed.totals["tokens"]) / fed.batch.tokens.size,
        "data/tile_fill": float(fed.totals["tiles"]) / slots if slots else 1.0,
        "data/tile_imbalance": float(fed.totals["tile_imbalance"]),
    }


def choose_shards(mesh: Mesh, wanted: int, saved: Mapping[str, Any] | None) -> int:
    """How many data shards a run has.

    Args:
      mesh: that the batch is split over.
      wanted: 0: as a saved state has, or one per process as far as the parts of the batch allow.
      saved: state of the data to go on from, or None.

    Raises:
      UserError: they do not divide the parts of the batch, or the saved state has another number.
    """
    parts = batch_shards(mesh)
    found = len(saved["shards"]) if saved else wanted or math.gcd(parts, jax.process_count())
    if wanted and wanted != found:
        raise UserError(
            f"data.shards is {wanted}, but the checkpoint's data is in {found} shards; leave it 0"
            " or begin in a new workdir with init_from"
        )
    if parts % found:
        raise UserError(
            f"the data is in {found} shards, which must divide the {parts} parts of the batch"
            f" (mesh data x fsdp x expert); choose a mesh with a multiple of {found} parts"
        )
    return found


def _own_parts(mesh: Mesh) -> frozenset[int]:
    """The parts of the batch that devices of this process hold."""
    parts = batch_shards(mesh)
    places = batch_sharding(mesh).addressable_devices_indices_map((1, parts))
    return frozenset(index[1].start or 0 for index in places.values())


def _total(counts: jax.Array) -> dict[str, jax.Array]:
    """Sums of int[P, G, `COUNTED`], and the imbalance of the tiles."""
    counts = counts.astype(jnp.float32)
    tiles = counts[..., COUNTED.index("tiles")]
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
