"""Features of the pictures lately seen, on the device: a picture asked about often is encoded once.

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

SLOTS = 32  # tiles kept, unless one step needs more
_AT_ONCE = 64  # tiles that pass the vision tower together


class ImageCache:
    """A table of projected tiles, as `Batch.image_index` points into it; the oldest give way.

    Attributes:
      encoded: tiles that passed the vision tower so far.
    """

    def __init__(self, steps: CompiledSteps, params):
        self._steps, self._params = steps, params
        self._slots: OrderedDict[int, int] = OrderedDict()  # digest -> slot, oldest first
        self._capacity = 0
        self._table: Any = None  # an array once there are images
        self.encoded = 0

    def place(self, prompts: Sequence[Prompt]) -> tuple[jax.Array, list[np.ndarray]]:
        """A table [2 + slots * Q, D] with the tiles of these prompts, and their image indices."""
        tiles = {d: t for p in prompts for d, t in zip(p.digests, p.tiles, strict=True)}
        if self._table is None or len(tiles) > self._capacity:
            self._capacity = max(SLOTS, tile_bucket(len(tiles))) if tiles else 0
            self._table = self._steps.table(self._params, self._capacity)
            self._slots.clear()
        for digest in tiles:
            if digest in self._slots:
                self._slots.move_to_end(digest)
        fresh = [digest for digest in tiles if digest not in self._slots]
        for start in range(0, len(fresh), _AT_ONCE):
            self._encode(fresh[start : start + _AT_ONCE], tiles)
        return self._table, [p.placed([self._slots[d] for d in p.digests]) for p in prompts]

    def _encode(self, digests: Sequence[int], tiles: dict[int, np.ndarray]) -> None:
        used = set(self._slots.values())
        free = [slot for slot in range(self._capacity) if slot not in used]
        while len(free) < len(digests):
            free.append(self._slots.popitem(last=False)[1])
        pixels = np.stack([tiles[digest] for digest in digests])
        pad = tile_bucket(len(pixels)) - len(pixels)
        pixels = np.pad(pixels, ((0, pad), *((0, 0),) * 3))
        # Padding goes behind the table, where writing has no effect.
        slots = np.array(free[: len(digests)] + [self._capacity] * pad, np.int32)
        table, self._table = self._table, None  # which is donated: gone, should this be interrupted
        self._table = self._steps.encode(self._params, table, pixels, slots)
        self._slots |= dict(zip(digests, free, strict=False))
        self.encoded += len(digests)
