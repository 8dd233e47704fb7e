"""FLOPs and HBM traffic of the TPU kernels, computed from the shapes of their operands.

XLA cannot analyse a kernel.  The estimates that kernels provide count all rows of a buffer and all
blocks of a mask, including those that the kernels skip.
"""

import math

from vl2jax.ops.attention.tpu import MAX_BLOCK
from vl2jax.ops.experts.tpu_gmm import MIN_ROWS, tile_columns, tile_rows
from vl2jax.ops.experts.tpu_int8 import NAME
from vl2jax.plan.hlo import KernelCost
from vl2jax.plan.hlo_text import Array


def kernel_cost(rows_per_device: float, groups_per_layer: int) -> KernelCost:
    """Makes a cost function of the grouped matrix product and splash attention kernels.

    Args:
      rows_per_device: number of (token, expert) pairs of a device if the load is balanced; a buffer
        can have more rows.
      groups_per_layer: number of experts of one layer on a device; a weight array can contain the
        experts of all layers.

    Returns:
      A function for `hlo.analyse`.
    """

    def cost(name: str, operands: list[Array], results: tuple[Array, ...]):
        if name.startswith(NAME):
            return _int8(operands, results, rows_per_device, groups_per_layer)
        if name.startswith(("gmm", "tgmm")):
            return _grouped(name, operands, results, rows_per_device, groups_per_layer)
        if name.startswith("splash"):
            return _splash(name, operands, results)
        return None

    return cost


def _grouped(name, operands, results, limit: float, layer: int) -> tuple[float, float]:
    """Grouped matrix product: a tile of rows is computed once per expert with rows in it."""
    left, right = [a for a in operands if len(a.shape) >= 2][-2:]
    out, size = results[0], left.nbytes / math.prod(left.shape)
    buffer = left.shape[0]
    groups = (out if name.startswith("tgmm") else right).shape[0]
    tile, rows = tile_rows(buffer, min(groups, layer)), min(buffer, limit)
    active = min(groups, layer, max(rows, 1))
    visits = max(rows / tile, 1) + active - 1
    if name.startswith("tgmm"):
        inner, outer = left.shape[1], right.shape[1]
        again = -(-outer // tile_columns(outer)), -(-inner // tile_columns(inner))
        read = rows * (inner * again[0] + outer * again[1]) * size
        return 2 * visits * tile * inner * outer, read + out.nbytes
    inner, outer = left.shape[1], out.shape[1]
    columns, parts = -(-outer // tile_columns(outer)), -(-inner // tile_columns(inner))
    weights = (visits if parts > 1 else active) * inner * outer * size
    read = rows * inner * columns * size
    return 2 * visits * tile * inner * outer, read + weights + rows * outer * size


def _int8(operands, results, limit: float, layer: int) -> tuple[float, float]:
    """Grouped product with int8 weights: an expert's weight is read once, if it has rows."""
    x, values, scale = [a for a in operands if len(a.shape) >= 2][-3:]
    inner, outer = values.shape[-2:]
    active = min(layer, max(limit, 1))
    rows = min(x.shape[0], limit)
    read = rows * inner * -(-outer // tile_columns(outer)) * x.nbytes / x.size
    written = rows * outer * results[0].nbytes / results[0].size
    weights = active * outer * (inner + scale.nbytes / scale.size)
    return 2.0 * max(rows, active * MIN_ROWS) * inner * outer, read + weights + written


def _splash(name, operands, results) -> tuple[float, float]:
    """Splash attention: with a causal mask, only blocks on and below the diagonal are computed."""
    # [B, H, T, .], or [H, T, .] if there is one row.
    q, k, v = [a for a in operands if len(a.shape) >= 3 and a.dtype in ("bf16", "f32")][:3]
    length = q.shape[-2]
    block = next(b for b in range(MAX_BLOCK, 0, -128) if length % b == 0)
    blocks = length // block
    # With a causal mask, the kernel has the positions of the queries as an additional operand.
    causal = any(a.shape == (length, 128) for a in operands)
    share = (blocks + 1) / (2 * blocks) if causal else 1.0
    scores = math.prod(q.shape[:-1]) * k.shape[-2] * share
    keys, values = q.shape[-1], v.shape[-1]
    products = keys + values
    if "_dq" in name:
        products = 2 * keys + values
    elif "_dkv" in name:
        products = 2 * keys + 2 * values
    again = (k.nbytes + v.nbytes) * max(
        blocks * share - 1, 0
    )  # keys and values are read per block of q
    moved = sum(a.nbytes for a in (*operands, *results) if a.in_memory)
    return 2.0 * scores * products, moved + again
