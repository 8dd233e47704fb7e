"""TPU chips: memory, speed and links; how long a collective takes on their torus."""

import dataclasses
from collections.abc import Sequence

from vl2jax.common.errors import UserError
from vl2jax.plan.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, as Google Cloud's documentation of the version describes it.

    Attributes:
      name: as topologies are named.
      hbm: bytes of main memory.
      flops: bfloat16 operations per second.
      bandwidth: bytes per second of main memory.
      link: bytes per second of one link in one direction.
      wraps: an axis of the slice of a multiple of this length is a ring.
    """

    name: str
    hbm: float
    flops: float
    bandwidth: float
    link: float
    wraps: int


_GIB = 2.0**30
# docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e}, "System architecture". The link is what the
# page gives as ICI bandwidth of a chip in one direction, shared among its 4 (2D) or 6 (3D) links.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * _GIB, 275e12, 1228e9, 2400e9 / 8 / 6, wraps=4),
        Chip("v5e", 16 * _GIB, 197e12, 819e9, 1600e9 / 8 / 4, wraps=16),
        Chip("v5p", 95 * _GIB, 459e12, 2765e9, 1200e9 / 2 / 6, wraps=4),
        Chip("v6e", 32 * _GIB, 918e12, 1600e9, 3200e9 / 8 / 4, wraps=16),
    )
}


def find_chip(topology: str) -> Chip:
    """The chip of a topology like `v5p:4x4x4`.

    Raises:
      UserError: not such a name, or a chip that is not in the table.
    """
    name, colon, shape = topology.partition(":")
    if not colon or not all(part.isdigit() for part in shape.split("x")):
        raise UserError(f"--topology must be CHIP:SHAPE, like v5p:4x4x4, got {topology!r}")
    if name not in CHIPS:
        raise UserError(f"--topology {topology!r}: chips are {', '.join(CHIPS)}")
    return CHIPS[name]


def collective_seconds(chip: Chip, where: Sequence[Sequence[int]], collective: Collective) -> float:
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
