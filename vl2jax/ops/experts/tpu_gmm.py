"""Routed experts on TPU: JAX's grouped matrix product kernels (megablox).

Suffixes: P (token, expert) pairs sorted by expert, G experts in the weights, D width,
F expert width.
"""

import functools

import jax
import jax.numpy as jnp

MAX_ROWS, MIN_ROWS = 512, 16  # rows of a tile
MAX_TILE, LANES = 1024, 128  # columns of a tile


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_ffn(
    x_PD: jax.Array, w, group_sizes_G: jax.Array, used: int, interpret: bool = False
) -> jax.Array:
    """Applies expert g, `down(silu(gate(x)) * up(x))`, to its `group_sizes[g]` consecutive rows.

    Products accumulate in float32.  Gradients of weights are computed in float32 and returned in
    the weights' dtype.  Weights of experts without rows are not read.  Rows after the last group
    are 0.

    Args:
      x_PD: rows, sorted by expert.
      w: `ExpertWeights`, gate and up [G, D, F], down [G, F, D].
      group_sizes_G: int32, number of rows of each expert; their sum may be less than P.
      used: number of experts that can have rows; less than G if w has several layers.
      interpret: whether to interpret the kernels, which works without a TPU but is slow.

    Returns:
      [P, D] in the dtype of x.
    """
    return _forward(x_PD, w, group_sizes_G, used, interpret)[0]


def _forward(x_PD, w, group_sizes, used, interpret):
    product = Products(x_PD.dtype, len(x_PD), group_sizes, used, interpret)
    gate, up = (product.rows(x_PD, weight) for weight in (w.gate, w.up))
    y_PD = product.rows(silu_gate(gate, up), w.down)
    return product.filled(y_PD), (x_PD, w, group_sizes, gate, up)


def _backward(used, interpret, residuals, g_PD):
    x_PD, w, group_sizes, gate, up = residuals
    product = Products(x_PD.dtype, len(x_PD), group_sizes, used, interpret)
    hidden, hidden_vjp = jax.vjp(silu_gate, gate, up)
    d_gate, d_up = hidden_vjp(product.rows(g_PD, w.down, transpose=True))
    of_gate = product.rows(d_gate, w.gate, transpose=True).astype(jnp.float32)
    dx_PD = of_gate + product.rows(d_up, w.up, transpose=True).astype(jnp.float32)
    dw = w._replace(
        gate=product.weights(x_PD, d_gate).astype(w.gate.dtype),
        up=product.weights(x_PD, d_up).astype(w.up.dtype),
        down=product.weights(hidden, g_PD).astype(w.down.dtype),
    )
    return product.filled(dx_PD.astype(x_PD.dtype)), dw, None


grouped_ffn.defvjp(_forward, _backward)


def silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Computes `silu(gate) * up` in float32; the result has the dtype of `gate`."""
    hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return hidden.astype(gate.dtype)


class Products:
    """Grouped matrix products; rows are padded to whole tiles for the kernels.

    Args:
      dtype: dtype of the operands.
      rows: number of rows, P.
      group_sizes: int[G], number of rows of each group.
      used: number of groups that can have rows, see `grouped_ffn`.
      interpret: whether to interpret the kernels.
    """

    def __init__(
        self, dtype: jnp.dtype, rows: int, group_sizes: jax.Array, used: int, interpret: bool
    ):
        self.dtype, self.size, self.interpret = dtype, rows, interpret
        self.group_sizes = group_sizes.astype(jnp.int32)
        self.tile = tile_rows(rows, used)

    def rows(self, x: jax.Array, weight: jax.Array, transpose: bool = False) -> jax.Array:
        """Multiplies each row by its group's weight.

        Args:
          x: [P, K].
          weight: [G, K, N], or [G, N, K] if transposed.
          transpose: whether to multiply by the transposed weights.

        Returns:
          [P, N] in `dtype`; rows after the last group are undefined.
        """
        from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

        inner, outer = weight.shape[1:][::-1] if transpose else weight.shape[1:]
        return gmm(
            self._padded(x),
            weight.astype(self.dtype),
            self.group_sizes,
            preferred_element_type=self.dtype,
            tiling=(self.tile, tile_columns(inner), tile_columns(outer)),
            transpose_rhs=transpose,
            interpret=self.interpret,
        )[: self.size]

    def weights(self, x: jax.Array, g: jax.Array) -> jax.Array:
        """Gradient of the weights: `x^T g` of each group, [P, K] and [P, N] -> float32[G, K, N]."""
        from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

        return tgmm(
            self._padded(x).swapaxes(0, 1),
            self._padded(g.astype(self.dtype)),
            self.group_sizes,
            preferred_element_type=jnp.float32,
            tiling=(self.tile, tile_columns(x.shape[1]), tile_columns(g.shape[1])),
            interpret=self.interpret,
        )

    def filled(self, x: jax.Array) -> jax.Array:
        """Sets rows after the last group to 0; the kernels do not write them."""
        return jnp.where((jnp.arange(self.size) < self.group_sizes.sum())[:, None], x, 0)

    def _padded(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x.astype(self.dtype), ((0, -self.size % self.tile), (0, 0)))


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: a power of two near the mean number of rows per group.

    The kernel computes a tile once for each group that has rows in it.
    """
    mean = max(rows // groups, 1)
    return min(MAX_ROWS, max(MIN_ROWS, 1 << (mean.bit_length() - 1)))


def tile_columns(size: int) -> int:
    """Columns of a tile: as few tiles as possible, of nearly equal size."""
    tiles = -(-size // MAX_TILE)
    return -(-size // tiles // LANES) * LANES
