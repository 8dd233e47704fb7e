"""One notation for how a tensor lies there and here: `(H K) D -> D H K`.

It gives both shapes and both directions; every conversion is a reshape and a transpose.
"""

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Axes:
    """The `axes` column with sizes: shapes on both sides and the way between them."""

    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    _split: tuple[int, ...]  # the original with every group taken apart
    _order: tuple[int, ...]  # which of its axes comes where, squeezed ones first
    split_axis: int | None  # where the first original axis ends up, if it stays whole

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Original layout to ours; the first original axis may be a part of the whole.

        Returns a view where numpy can.
        """
        split = self._part(self._split, 0, x.shape[0])
        shape = self._part(self.shape, self.split_axis, x.shape[0])
        return x.reshape(split).transpose(self._order).reshape(shape)

    def backward(self, x: np.ndarray) -> np.ndarray:
        """Our layout to the original: the exact inverse of `forward`."""
        rows = None if self.split_axis is None else x.shape[self.split_axis]
        split = self._part(self._split, 0, rows)
        inverse = np.argsort(self._order)
        x = x.reshape([split[axis] for axis in self._order]).transpose(inverse)
        return x.reshape(self._part(self.hf_shape, 0, rows))

    def _part(self, shape, axis, size) -> tuple[int, ...]:
        """`shape` with `axis` cut to `size`, where the tensor can be cut at all."""
        if self.split_axis is None or axis is None:
            return shape
        return (*shape[:axis], size, *shape[axis + 1 :])


class _Sizes(dict):
    """Axis sizes by letter; a number is its own size."""

    def __missing__(self, name: str) -> int:
        return int(name)


@functools.cache
def _parse(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Splits `(H K) D -> D H K` into ((H, K), (D,)) and (D, H, K)."""
    left, right = axes.split(" -> ")
    groups: list[tuple[str, ...]] = []
    rest = left
    while rest:
        group, _, rest = rest[1:].partition(")") if rest[0] == "(" else rest.partition(" ")
        groups.append(tuple(group.split()))
        rest = rest.strip()
    return tuple(groups), tuple(right.split())


def sized(axes: str, sizes: dict[str, int]) -> Axes:
    """Gives the sizes of a configuration to an `axes` column."""
    groups, right = _parse(axes)
    sizes = _Sizes(sizes)
    names = [name for group in groups for name in group]
    squeezed = [i for i, name in enumerate(names) if name not in right]
    first = groups[0][0]
    return Axes(
        hf_shape=tuple(math.prod(sizes[name] for name in group) for group in groups),
        shape=tuple(sizes[name] for name in right),
        _split=tuple(sizes[name] for name in names),
        _order=(*squeezed, *(names.index(name) for name in right)),
        split_axis=right.index(first) if groups[0] == (first,) and first in right else None,
    )
