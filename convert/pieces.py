"""The parts in which parameters are moved, each small enough to be held in memory."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from convert.mapping import Entry, Leaf

PIECE_BYTES = 64 * 2**20  # larger tensors are moved some rows at a time


class Piece(NamedTuple):
    """A part of a tensor small enough to be held: rows `start:stop` there, `index` here."""

    leaf: Leaf
    entry: Entry
    start: int
    stop: int
    index: tuple[slice, ...]

    def squeeze(self, values: np.ndarray) -> np.ndarray:
        """Takes the stack's axes, all of size 1, off what was read at `index`."""
        return values.reshape(values.shape[len(self.entry.index) :])

    def unsqueeze(self, values: np.ndarray) -> np.ndarray:
        """Puts the stack's axes onto values to be written at `index`."""
        return values[(None,) * len(self.entry.index)]


def rows_per_piece(leaf: Leaf, itemsize: int) -> int | None:
    """Rows of an original tensor that are moved at once; None moves each tensor whole."""
    axes = leaf.entries[0].axes
    nbytes = math.prod(axes.shape) * itemsize
    if axes.split_axis is None or nbytes <= PIECE_BYTES:
        return None
    return max(1, PIECE_BYTES * axes.hf_shape[0] // nbytes)


def chunk_shape(leaf: Leaf, itemsize: int) -> tuple[int, ...]:
    """The part of a parameter that one piece fills: its chunks on the disk."""
    axes, rows = leaf.entries[0].axes, rows_per_piece(leaf, itemsize)
    piece = list(axes.shape)
    if rows is not None and axes.split_axis is not None:
        piece[axes.split_axis] = rows
    return (1,) * (len(leaf.shape) - len(axes.shape)) + tuple(piece)


def pieces(leaf: Leaf, itemsize: int) -> Iterator[Piece]:
    """The parts in which a parameter is read and written, in the order of its memory."""
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
