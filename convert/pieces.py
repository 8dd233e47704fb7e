"""Splits parameters into pieces, which are converted one at a time to save memory."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from convert.mapping import Entry, Leaf
from vl2jax.parallel.sharding import param_spec

PIECE_BYTES = 64 * 2**20  # larger tensors are split along their first axis
LEAST_CHUNK = 128 * 2**10  # bytes; smaller chunks would cost more requests than they save bytes
MOST_PARTS = {"fsdp": 64, "tensor": 8}  # into which an axis is divided


class Piece(NamedTuple):
    """A slice of an original tensor, and its place in our parameter.

    Attributes:
      leaf: the parameter.
      entry: the original tensor.
      start, stop: range of rows (first axis) of the original tensor.
      index: the corresponding slice of the parameter.
    """

    leaf: Leaf
    entry: Entry
    start: int
    stop: int
    index: tuple[slice, ...]

    def squeeze(self, values: np.ndarray) -> np.ndarray:
        """Removes the axes of the stack, which have size 1, from `parameter[index]`."""
        return values.reshape(values.shape[len(self.entry.index) :])

    def unsqueeze(self, values: np.ndarray) -> np.ndarray:
        """Adds the axes of the stack to values for `parameter[index]`."""
        return values[(None,) * len(self.entry.index)]


def rows_per_piece(leaf: Leaf, itemsize: int) -> int | None:
    """Returns the number of rows of an original tensor in a piece; None: the whole tensor.

    Args:
      leaf: the parameter.
      itemsize: bytes per element of the parameter.
    """
    axes = leaf.entries[0].axes
    nbytes = math.prod(axes.shape) * itemsize
    if axes.split_axis is None or nbytes <= PIECE_BYTES:
        return None
    return max(1, PIECE_BYTES * axes.hf_shape[0] // nbytes)


def chunk_shape(leaf: Leaf, itemsize: int) -> tuple[int, ...]:
    """Returns the shape of the chunks on disk, which divide the pieces of a parameter.

    They are divided along the axes that a mesh shards (`PARAM_RULES`), `fsdp` first, so that a
    process that needs one shard reads little else.
    """
    axes, rows = leaf.entries[0].axes, rows_per_piece(leaf, itemsize)
    piece = list(axes.shape)
    if rows is not None and axes.split_axis is not None:
        piece[axes.split_axis] = rows
    chunk = [1] * (len(leaf.shape) - len(axes.shape)) + piece
    spec = param_spec(leaf.path)
    for name in ("fsdp", "tensor"):
        for axis in (axis for axis, one in enumerate(spec) if one == name):
            while (
                chunk[axis] % 2 == 0
                and leaf.shape[axis] // chunk[axis] < MOST_PARTS[name]
                and math.prod(chunk) * itemsize >= 2 * LEAST_CHUNK
            ):
                chunk[axis] //= 2
    return tuple(chunk)


def pieces(leaf: Leaf, itemsize: int) -> Iterator[Piece]:
    """Yields the pieces of a parameter, in the order of its original tensors and their rows."""
    rows = rows_per_piece(leaf, itemsize)
    for entry in leaf.entries:
        axes = entry.axes
        count = axes.hf_shape[0]
        for start in range(0, count, rows or count):
            stop = min(start + (rows or count), count)
            place = [slice(0, size) for size in axes.shape]
            if rows is not None and axes.split_axis is not None:
                place[axes.split_axis] = slice(start, stop)
            stacked = [slice(i, i + 1) for i in entry.index]
            yield Piece(leaf, entry, start, stop, (*stacked, *place))
