"""Routed experts on TPU with int8 weights: a grouped product that reads int8 and casts on the chip.

Megablox takes no int8.  Converting a layer first would read it, write it and read it again.

Suffixes: T tokens, K experts per token, P = T * K (token, expert) pairs, E experts, G experts in
the weights, D width, F expert width, R rows of the padded layout, in which each tile of rows
belongs to one expert.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vl2jax.ops.experts.tpu_gmm import MAX_TILE, silu_gate, tile_columns, tile_rows
from vl2jax.ops.matmul import Int8, product

NAME = "int8_experts"  # of the kernel


def unsupported(x_TD, weights_TK, experts_TK, w, first=0, n_experts=None) -> str:
    """Supports int8 weights and bfloat16 tokens."""
    del weights_TK, experts_TK, first, n_experts
    if not isinstance(w.gate, Int8):
        return "not int8 weights"
    return "" if x_TD.dtype == jnp.bfloat16 else "not bfloat16"


def int8_experts(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    w: Any,
    first: jax.Array | int = 0,
    n_experts: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Reads the int8 weights of each expert that has tokens once, whatever the number of tokens.

    Same arguments and result as `ops.experts.routed_experts`, besides `interpret`: whether to
    interpret the kernel, which works without a TPU but is slow.  There is no gradient.
    """
    tiles = _Tiles.of(experts_TK, n_experts or w.gate.shape[0], first)
    x_RD = x_TD[tiles.tokens]
    multiply = functools.partial(_multiply, tiles, interpret=interpret)
    hidden = silu_gate(multiply(x_RD, w.gate), multiply(x_RD, w.up))
    y_PD = multiply(hidden, w.down)[tiles.rows]
    y_TKD = jnp.where((tiles.rows < len(x_RD))[:, None], y_PD, 0).reshape(*experts_TK.shape, -1)
    weights_TK = weights_TK.astype(jnp.float32)
    return product("TK,TKD->TD", weights_TK, y_TKD.astype(jnp.float32)).astype(x_TD.dtype)


class _Tiles(NamedTuple):
    """The padded layout.

    Attributes:
      size: rows of a tile.
      used: int32[1], number of tiles with rows.
      experts: int32[tiles], expert of each tile in the weights.  Tiles after the last repeat it, so
        that they read nothing.
      tokens: int32[R], token of each row; any token for padding.
      rows: int32[P], row of each pair; R for pairs of no expert.
    """

    size: int
    used: jax.Array
    experts: jax.Array
    tokens: jax.Array
    rows: jax.Array

    @classmethod
    def of(cls, experts_TK: jax.Array, n_experts: int, first: jax.Array | int) -> "_Tiles":
        flat_P, top_k = experts_TK.reshape(-1), experts_TK.shape[-1]
        size = tile_rows(flat_P.size, n_experts)
        most = flat_P.size // size + min(n_experts, flat_P.size)  # an expert wastes under one tile
        counts_E = jnp.bincount(flat_P, length=n_experts).astype(jnp.int32)
        tiles_E = -(-counts_E // size)
        ends_E = jnp.cumsum(tiles_E)
        used = ends_E[-1]
        place = jnp.minimum(jnp.arange(most), jnp.maximum(used - 1, 0))
        expert = jnp.minimum(jnp.searchsorted(ends_E, place, side="right"), n_experts - 1)
        order_P = jnp.argsort(flat_P, stable=True)
        before_E = jnp.cumsum(counts_E) - counts_E
        sorted_P = jnp.minimum(flat_P[order_P], n_experts - 1)
        rank_P = jnp.arange(flat_P.size) - before_E[sorted_P]
        row_P = (ends_E - tiles_E)[sorted_P] * size + rank_P
        row_P = jnp.where(flat_P[order_P] < n_experts, row_P, most * size)
        tokens = jnp.zeros(most * size, jnp.int32).at[row_P].set(order_P // top_k, mode="drop")
        rows = jnp.zeros_like(row_P).at[order_P].set(row_P)
        return cls(size, used[None], (expert + first).astype(jnp.int32), tokens, rows)


def _multiply(tiles: _Tiles, x_RK: jax.Array, w: Int8, interpret: bool) -> jax.Array:
    """Multiplies each row by its expert's weight: [R, K] and [G, K, N] -> [R, N]."""
    # Imported here because importing Pallas is slow.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, inner), outer, size = x_RK.shape, w.shape[-1], tiles.size
    columns = outer if outer <= MAX_TILE else tile_columns(outer)

    def last(i, used):
        return jnp.minimum(i, jnp.maximum(used[0] - 1, 0))

    def kernel(used, experts, x, values, scale, y):
        del experts

        @pl.when(pl.program_id(1) < used[0])
        def _():
            sums = jax.lax.dot(
                x[...], values[...].astype(x.dtype), preferred_element_type=jnp.float32
            )
            y[...] = (sums * scale[...]).astype(y.dtype)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(-(-outer // columns), rows // size),  # so an expert's columns are read once
        in_specs=[
            pl.BlockSpec((size, inner), lambda n, i, used, experts: (last(i, used), 0)),
            pl.BlockSpec((None, inner, columns), lambda n, i, used, experts: (experts[i], 0, n)),
            pl.BlockSpec((None, 1, columns), lambda n, i, used, experts: (experts[i], 0, n)),
        ],
        out_specs=pl.BlockSpec((size, columns), lambda n, i, used, experts: (last(i, used), n)),
    )
    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, outer), x_RK.dtype),
        grid_spec=grid,
        interpret=interpret,
        name=NAME,
    )
    return run(tiles.used, tiles.experts, x_RK, w.values, w.scale)
