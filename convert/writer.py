"""Writes an Orbax checkpoint whose arrays are generated slice by slice and never fully in memory.

Orbax calls a type handler to write each leaf.  The handler here generates the slices one after the
other, and writes each with tensorstore.  Orbax does the rest (metadata, finalization, atomic
rename), so the result is an ordinary Orbax checkpoint.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vl2jax.checkpoints.array_writer import checked_handler, write_spec
from vl2jax.checkpoints.orbax_io import silence_orbax
from vl2jax.checkpoints.plain_names import plain_name

_IN_FLIGHT = 64 * 2**20  # maximum bytes of slices whose writes have not finished


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is generated while it is written.

    Attributes:
      shape: shape of the array.
      dtype: dtype of the array.
      chunk: shape of the chunks on disk; each slice fills whole chunks.
      slices: generates (index, values) pairs, which together fill the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    slices: Callable[[], Iterator[tuple[tuple, np.ndarray]]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_streamed(directory: Path, arrays: Mapping[str, StreamedArray]) -> None:
    """Writes an Orbax checkpoint.

    Args:
      directory: the output; must not exist.
      arrays: the arrays by path ("params/decoder/..."), in the order in which they are written.

    Raises:
      OSError, ValueError: writing failed.
    """
    import orbax.checkpoint as ocp

    tree: dict = {"params": {}, "router": {}}
    for path, array in arrays.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    silence_orbax()
    handler = checked_handler(ocp, (StreamedArray, _handler(ocp)))
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(plain_name(directory), args=ocp.args.PyTreeSave(tree))


def _handler(ocp):
    """Makes the type handler; a function, because Orbax is imported late."""

    class StreamedArrayHandler(ocp.type_handlers.NumpyHandler):
        """Stores a `StreamedArray` like a numpy array."""

        async def serialize(self, values, infos, args=None):
            args = args or [None] * len(values)
            for value, info, arg in zip(values, infos, args, strict=True):
                await info.await_path_creation()
                spec = write_spec(ocp, info, arg, value.shape, value.chunk, value.dtype, process=0)
                await _write(value, spec, info.ts_context)
            return []

    return StreamedArrayHandler()


async def _write(array: StreamedArray, spec: dict, context) -> None:
    """Writes all slices, with a bounded number of bytes in flight."""
    import tensorstore as ts

    store = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
    waiting: collections.deque = collections.deque()
    in_flight = 0
    try:
        for index, values in array.slices():
            waiting.append((store[index].write(values), values.nbytes))
            in_flight += values.nbytes
            while in_flight > _IN_FLIGHT:
                in_flight -= await _first(waiting)
        while waiting:
            await _first(waiting)
    finally:  # after an error, wait for all writes, because the caller may remove the directory
        for future, _ in waiting:
            with contextlib.suppress(Exception):
                await future


async def _first(waiting: collections.deque) -> int:
    """Waits for the oldest write; returns its number of bytes."""
    future, nbytes = waiting[0]
    await future
    waiting.popleft()
    return nbytes
