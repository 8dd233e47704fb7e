"""Counts weights that are not finite while they are converted."""

import dataclasses
import threading

import numpy as np

from vl2jax.common.errors import clip

_MOST_TENSORS = 10  # that are named


@dataclasses.dataclass
class _Count:
    """Numbers of values of one tensor: all, NaN, and infinite."""

    values: int = 0
    nan: int = 0
    infinite: int = 0


class NonFinite:
    """Counts values that are NaN or infinite, by tensor."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}
        self._lock = threading.Lock()

    def add(self, name: str, values: np.ndarray, size: int) -> None:
        """Counts the values of a piece of a tensor.

        Args:
          name: name of the tensor.
          values: float32 or bfloat16 values of the piece.
          size: number of values of the whole tensor.
        """
        bits, exponent = (np.uint16, 0x7F80) if values.itemsize == 2 else (np.uint32, 0x7F800000)
        found = values[(values.view(bits) & bits(exponent)) == exponent]
        if not found.size:
            return
        nan = int(np.isnan(found).sum())
        with self._lock:
            count = self._counts.setdefault(name, _Count(size))
            count.nan += nan
            count.infinite += found.size - nan

    def report(self) -> str | None:
        """Describes the tensors that have such values in one line; None: all values are finite."""
        if not self._counts:
            return None
        shown = [
            f"{clip(name, 120)} ({count.nan} NaN and {count.infinite} infinite of {count.values})"
            for name, count in sorted(self._counts.items(), key=lambda item: item[0])[
                :_MOST_TENSORS
            ]
        ]
        more = len(self._counts) - len(shown)
        total = sum(count.nan + count.infinite for count in self._counts.values())
        return (
            f"{total} weights in {len(self._counts)} tensors are not finite: {', '.join(shown)}"
            + (f" and {more} more tensors" if more else "")
        )
