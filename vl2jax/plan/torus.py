"""Slices of TPU chips: their names, and how long a collective takes on their torus."""

from collections.abc import Sequence

from vl2jax.common.chips import TPU, TPUS
from vl2jax.common.errors import UserError
from vl2jax.plan.hlo import Collective


def find_chip(topology: str) -> TPU:
    """The chip of a topology like `v5p:4x4x4`.

    Raises:
      UserError: not such a name, or a chip that is not in the table.
    """
    name, colon, shape = topology.partition(":")
    if not colon or not all(part.isdigit() for part in shape.split("x")):
        raise UserError(f"--topology must be CHIP:SHAPE, like v5p:4x4x4, got {topology!r}")
    if name not in TPUS:
        raise UserError(f"--topology {topology!r}: chips are {', '.join(TPUS)}")
    return TPUS[name]


def collective_seconds(chip: TPU, where: Sequence[Sequence[int]], collective: Collective) -> float:
    """How long one run takes if the links do nothing else.

    A ring sends in both directions; a group that spans several axes of the torus uses the links of
    all; an exchange of all with all is bound by what crosses the middle of its longest axis.

    Args:
      where: coordinates of every device, by number in the program.
    """
    places = [tuple(where[number]) for number in collective.group]
    if len(places) < 2:
        return 0.0
    if collective.kind == "collective-permute":
        return collective.sent / chip.link
    shape = [1 + max(axis) for axis in zip(*where, strict=True)]
    spans = [len(set(axis)) for axis in zip(*places, strict=True)]
    rings = [
        span == size and size % chip.wraps == 0 for span, size in zip(spans, shape, strict=True)
    ]
    used = [(span, 2 if ring else 1) for span, ring in zip(spans, rings, strict=True) if span > 1]
    if not used:  # cores of one chip
        return collective.sent / chip.bandwidth
    seconds = collective.sent / (chip.link * sum(ways for _, ways in used))
    if collective.kind.endswith("all-to-all"):
        middle = max(span / (4 * ways) for span, ways in used) * collective.nbytes / chip.link
        seconds = max(seconds, middle)
    return seconds
