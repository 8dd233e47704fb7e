"""Accelerators: how fast they compute; of TPUs also memory, its speed, and that of their links.

Operations are dense bfloat16 ones per second, from the makers' data sheets.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      kinds: words of JAX's `device_kind` by which it is known.
      flops: operations per second.
    """

    kinds: tuple[str, ...]
    flops: float


@dataclasses.dataclass(frozen=True)
class TPU(Chip):
    """One TPU chip, as Google Cloud's documentation of the version describes it.

    Attributes:
      hbm: bytes of main memory.
      bandwidth: bytes per second of main memory.
      link: bytes per second of one link in one direction.
      wraps: an axis of the slice of a multiple of this length is a ring.
    """

    hbm: float
    bandwidth: float
    link: float
    wraps: int


_GIB = 2.0**30
# By the name that topologies have. docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e}, "System
# architecture". The link is what the page gives as ICI bandwidth of a chip in one direction, shared
# among its 4 (2D) or 6 (3D) links.
TPUS = {
    "v4": TPU(("TPU v4",), 275e12, 32 * _GIB, 1228e9, 2400e9 / 8 / 6, 4),
    "v5e": TPU(("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 1600e9 / 8 / 4, 16),
    "v5p": TPU(("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 1200e9 / 2 / 6, 4),
    "v6e": TPU(("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1600e9, 3200e9 / 8 / 4, 16),
}
GPUS = (
    Chip(("A100",), 312e12),
    Chip(("H100 PCIe",), 756e12),
    Chip(("H100 NVL", "H200 NVL"), 835e12),
    Chip(("H100", "H200", "GH200"), 989e12),
    Chip(("B200",), 2250e12),
)


def peak_flops(device_kind: str, dtype) -> float | None:
    """The most operations a device can do in a second on dense matrices.

    Args:
      device_kind: as JAX names it, "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: of the computation; only 16-bit types have one peak whatever the precision asked for.

    Returns:
      Operations per second, or None where it is not known.
    """
    if str(getattr(dtype, "__name__", dtype)) not in ("bfloat16", "float16"):
        return None
    if re.search(r"\bMIG\b", device_kind):  # a part of a device
        return None
    found = [
        (len(kind), chip.flops)
        for chip in (*TPUS.values(), *GPUS)
        for kind in chip.kinds
        if re.search(rf"\b{kind}\b", device_kind)
    ]
    return max(found)[1] if found else None  # of the most special name
