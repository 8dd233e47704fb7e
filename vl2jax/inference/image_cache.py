"""Image cache: keeps features of recent images on the device, so an image is encoded only once.

Axis legend: Q tokens per tile, D width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vl2jax.inference.buckets import tile_bucket
from vl2jax.inference.sequence import Prompt
from vl2jax.inference.steps import CompiledSteps

SLOTS = 32  # number of cached tiles, unless one prefill needs more
_MAX_TILES = 64  # maximum number of tiles that are encoded together


class ImageCache:
    """An LRU cache of projected tiles, in a table that `Batch.image_index` points into.

    Tiles are identified by a hash of their pixels.

    Attributes:
      encoded: number of tiles that were encoded so far.
    """

    def __init__(self, steps: CompiledSteps, params):
        self._steps, self._params = steps, params
        self._slots: OrderedDict[int, int] = (
            OrderedDict()
        )  # digest -> tile slot, least recently used first
        self._capacity = 0
        self._table: Any = None  # an array after the first call of `place`
        self.encoded = 0

    def lookup(self, prompts: Sequence[Prompt]) -> tuple[jax.Array, list[np.ndarray]]:
        """Encodes the tiles of prompts that are not cached.

        Returns:
          A table [2 + slots * Q, D] with the tiles of all prompts, and each prompt's image index
          int32[T] into it.
        """
        tiles = {d: t for p in prompts for d, t in zip(p.digests, p.tiles, strict=True)}
        if self._table is None or len(tiles) > self._capacity:
            self._capacity = max(SLOTS, tile_bucket(len(tiles))) if tiles else 0
            self._table = self._steps.table(self._params, self._capacity)
            self._slots.clear()
        for digest in tiles:
            if digest in self._slots:
                self._slots.move_to_end(digest)
        fresh = [digest for digest in tiles if digest not in self._slots]
        for start in range(0, len(fresh), _MAX_TILES):
            self._encode(fresh[start : start + _MAX_TILES], tiles)
        return self._table, [p.image_index_in([self._slots[d] for d in p.digests]) for p in prompts]

    def _encode(self, digests: Sequence[int], tiles: dict[int, np.ndarray]) -> None:
        """Encodes tiles into free slots of the table; evicts the least recently used ones."""
        used = set(self._slots.values())
        free = [slot for slot in range(self._capacity) if slot not in used]
        while len(free) < len(digests):
            free.append(self._slots.popitem(last=False)[1])
        pixels = np.stack([tiles[digest] for digest in digests])
        pad = tile_bucket(len(pixels)) - len(pixels)
        pixels = np.pad(pixels, ((0, pad), *((0, 0),) * 3))
        # Padding tiles get a slot beyond the table, which `encode` ignores.
        slots = np.array(free[: len(digests)] + [self._capacity] * pad, np.int32)
        # The table is donated.  If the call is interrupted, no reference to it may remain.
        table, self._table = self._table, None
        self._table = self._steps.encode(self._params, table, pixels, slots)
        self._slots |= dict(zip(digests, free, strict=False))
        self.encoded += len(digests)
