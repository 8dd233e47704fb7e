"""Ranges of numbers in configurations."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vl2jax.common.errors import shown


class Range(NamedTuple):
    """The numbers from `low` to `high`, both included.

    Attributes:
      low, high: the bounds.
      above: whether `low` itself is excluded.
      below: whether `high` itself is excluded.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        """Whether `value` is a number in the range; NaN is in none."""
        is_inside = isinstance(value, int | float) and self.low <= value <= self.high
        return is_inside and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def __str__(self) -> str:
        low, high, is_open = _figure(self.low), _figure(self.high), self.high >= _MOST
        if not (self.above or self.below or is_open):
            return f"{low} to {high}"
        start = f"above {low}" if self.above else f"at least {low}"
        end = f" and {'below' if self.below else 'at most'} {high}"
        return start if is_open else start + end


_MOST = 2**31 - 1  # larger upper bounds are not said


def at_least(low: float) -> Range:
    """The numbers from `low` to the largest int32."""
    return Range(low, _MOST)


def outside(part: Any, ranges: Mapping[str, Range], where: str) -> list[str]:
    """Returns one message for each number of a dataclass that is outside its range.

    Args:
      part: the dataclass.  Fields that are None are not checked; tuples are checked by element.
      ranges: range by field.
      where: name of the dataclass in messages; "": the fields stand alone.
    """
    problems = []
    for name, allowed in ranges.items():
        value = getattr(part, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(one in allowed for one in values):
            field = f"{where}.{name}" if where else name
            problems.append(f"{field} must be {allowed}, got {shown(value)}")
    return problems


def _figure(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
