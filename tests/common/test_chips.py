"""Tests of the table of chips and of the lookup by device kind."""

import numpy as np
import pytest

from vl2jax.common.chips import TPUS, peak_flops


def test_tpus():
    assert {name: round(chip.flops / 1e12) for name, chip in TPUS.items()} == {
        **{"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918}
    }
    assert [round(TPUS[n].link * links / 1e9) for n, links in (("v5e", 4), ("v5p", 6))] == [
        *(200, 600)
    ]
    assert {name: chip.hbm / 2**30 for name, chip in TPUS.items()} == {
        **{"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
    }


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind, "bfloat16") == peak
    assert peak_flops(kind, np.dtype(np.float16)) == peak
    assert peak_flops(kind, np.float32) is None
