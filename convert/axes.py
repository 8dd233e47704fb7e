"""Notation for the layouts of a tensor, original and ours: `(H K) D -> D H K`, as in einops.

It defines both shapes and both directions; each conversion is a reshape and a transpose.
"""

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Axes:
    """An entry of the column `axes` with sizes: both shapes, and the conversion between them.

    Attributes:
      hf_shape: original shape.
      shape: our shape.
      split_axis: our axis that is the first original axis; None if that axis is split or squeezed.
    """

    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]
    _split: tuple[int, ...]  # the original shape with all groups expanded
    _order: tuple[int, ...]  # permutation of its axes, squeezed axes first
    split_axis: int | None

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Converts the original layout to ours.

        Args:
          x: the tensor, or a slice of it along its first axis if `split_axis` is not None.

        Returns:
          The tensor or slice in our layout; a view if numpy can make one.
        """
        split = self._part(self._split, 0, x.shape[0])
        shape = self._part(self.shape, self.split_axis, x.shape[0])
        return x.reshape(split).transpose(self._order).reshape(shape)

    def backward(self, x: np.ndarray) -> np.ndarray:
        """Converts our layout to the original; the exact inverse of `forward`."""
        rows = None if self.split_axis is None else x.shape[self.split_axis]
        split = self._part(self._split, 0, rows)
        inverse = np.argsort(self._order)
        x = x.reshape([split[axis] for axis in self._order]).transpose(inverse)
        return x.reshape(self._part(self.hf_shape, 0, rows))

    def _part(self, shape, axis, size) -> tuple[int, ...]:
        """`shape` with `size` along `axis`; unchanged if the tensor cannot be sliced."""
        if self.split_axis is None or axis is None:
            return shape
        return (*shape[:axis], size, *shape[axis + 1 :])


class _Sizes(dict):
    """Axis sizes by name; the size of a number is the number."""

    def __missing__(self, name: str) -> int:
        return int(name)


@functools.cache
def _parse(axes: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Parses `(H K) D -> D H K` to ((H, K), (D,)) and (D, H, K)."""
    left, right = axes.split(" -> ")
    groups: list[tuple[str, ...]] = []
    rest = left
    while rest:
        group, _, rest = rest[1:].partition(")") if rest[0] == "(" else rest.partition(" ")
        groups.append(tuple(group.split()))
        rest = rest.strip()
    return tuple(groups), tuple(right.split())


def sized(axes: str, sizes: dict[str, int]) -> Axes:
    """Inserts sizes into an entry of the column `axes`.

    Args:
      axes: the notation, such as `(H K) D -> D H K`.
      sizes: size of each axis name.
    """
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
