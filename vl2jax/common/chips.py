"""Peak FLOP/s of accelerators; for TPUs also memory size, memory bandwidth and link bandwidth.

Peaks are of dense bfloat16 operations, from the vendors' data sheets.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      kinds: names that identify it in JAX's `device_kind`.
      flops: peak operations per second, dense bfloat16.
    """

    kinds: tuple[str, ...]
    flops: float


@dataclasses.dataclass(frozen=True)
class TPU(Chip):
    """One TPU chip; numbers from Google Cloud's documentation of each version.

    Attributes:
      hbm: size of the main memory in bytes.
      bandwidth: main memory bandwidth in bytes per second.
      link: bandwidth of one interconnect link in one direction, in bytes per second.
      wraps: an axis of a slice is a ring (has wraparound links) if its length is a multiple of
        this.
    """

    hbm: float
    bandwidth: float
    link: float
    wraps: int


_GIB = 2.0**30
# By the name in topologies (`v5p:4x4x4`).  Source: docs.cloud.google.com/tpu/docs/{v4, v5e, v5p,
# v6e}, "System architecture".  Link bandwidth is the page's ICI bandwidth of a chip in one
# direction, divided by its 4 (2D torus) or 6 (3D torus) links.
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
    """Looks up the peak throughput of a device for dense matrix products.

    Args:
      device_kind: JAX's name of the device, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: dtype of the computation.

    Returns:
      Operations per second; None if the device is unknown or a MIG slice, or if the dtype is not
      bfloat16 or float16 (the peak of other dtypes depends on the matmul precision).
    """
    if str(getattr(dtype, "__name__", dtype)) not in ("bfloat16", "float16"):
        return None
    if re.search(r"\bMIG\b", device_kind):  # a slice of a GPU
        return None
    found = [
        (len(kind), chip.flops)
        for chip in (*TPUS.values(), *GPUS)
        for kind in chip.kinds
        if re.search(rf"\b{kind}\b", device_kind)
    ]
    return max(found)[1] if found else None  # the longest matching name is the most specific
