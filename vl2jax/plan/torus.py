"""TPU slices: their names, and the time of a collective on their torus of links."""

from collections.abc import Sequence

from vl2jax.common.chips import TPU, TPUS
from vl2jax.common.errors import UserError
from vl2jax.plan.hlo import Collective


def find_chip(topology: str) -> TPU:
    """Returns the chip of a topology such as `v5p:4x4x4`.

    Raises:
      UserError: the topology has another form, or the chip is unknown.
    """
    name, colon, shape = topology.partition(":")
    if not colon or not all(part.isdigit() for part in shape.split("x")):
        raise UserError(f"--topology must be CHIP:SHAPE, like v5p:4x4x4, got {topology!r}")
    if name not in TPUS:
        raise UserError(f"--topology {topology!r}: unknown chip; choose from {', '.join(TPUS)}")
    return TPUS[name]


def collective_seconds(chip: TPU, where: Sequence[Sequence[int]], collective: Collective) -> float:
    """Estimates the seconds of one run of a collective, with no other traffic on the links.

    A ring sends in both directions.  A group that spans several axes of the torus uses the links of
    all these axes.  An all-to-all is bound by its traffic across the middle of its longest axis.

    Args:
      chip: the chip.
      where: coordinates of all devices, by id in the program.
      collective: the collective.
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
