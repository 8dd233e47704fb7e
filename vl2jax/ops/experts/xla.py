"""Routed experts compiled by XLA: a loop over the experts that have tokens, in blocks of rows.

Suffixes: T tokens, K experts per token, P = T * K (token, expert) pairs sorted by expert,
E experts, D width, F expert width, M rows of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vl2jax.ops.experts.sorting import sorted_by_expert
from vl2jax.ops.experts.weights import ExpertWeights
from vl2jax.ops.matmul import Weight, cast, matmul, product
from vl2jax.ops.names import PRODUCT

MAX_BLOCK, JOINED_BLOCK, SMALL_BLOCK, TINY_BLOCK = 256, 64, 16, 4  # rows
ACTIVE, BLOCKS = "active_experts", "expert_blocks"  # name scopes of the loops


def blocked(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    w: ExpertWeights,
    block: int | None = None,
    first: jax.Array | int = 0,
    n_experts: int | None = None,
) -> jax.Array:
    """Sorts tokens by expert, then loops over the experts that have tokens, block by block.

    Only the weights of experts that have tokens are read.  The backward pass is a loop of the same
    kind; JAX's own derivative would update the whole weight stack in every block.

    Same arguments and result as `ops.experts.routed_experts`, besides `block`, the rows of a block;
    None: chosen by the mean number of tokens per expert.
    """
    n_experts = n_experts or w.gate.shape[0]
    block = block or block_rows(experts_TK.size, n_experts)

    def run(x_PD: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return _grouped_ffn(x_PD, w, group_sizes, jnp.asarray(first), block)

    return sorted_by_expert(run, x_TD, weights_TK, experts_TK, n_experts)


def block_rows(pairs: int, n_experts: int) -> int:
    """Rows of a block: a power of two near half the mean number of tokens per expert.

    On average half of an expert's last block is padding, so smaller blocks waste less.  With few
    tokens per expert the block is near the mean, and with very few near twice the mean, so that
    most experts need a single block.
    """
    mean = -(-pairs // n_experts)
    rows = max(-(-mean // 2), min(mean, SMALL_BLOCK), min(2 * mean, TINY_BLOCK))
    return min(MAX_BLOCK, 1 << (rows - 1).bit_length())


class _Used(NamedTuple):
    """One expert's weights in the compute dtype.

    Attributes:
      gate_up: gate and up [D, F] each, or both concatenated [D, 2F].  The concatenation is a copy,
        which pays off if many rows use it.
      down: [F, D].
    """

    gate_up: tuple[Weight, ...]
    down: Weight

    @classmethod
    def of(cls, w: ExpertWeights, expert: jax.Array, dtype: jnp.dtype, joined: bool) -> "_Used":
        def one(a: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(a, expert, keepdims=False)

        def side_by_side(*parts: jax.Array) -> jax.Array:
            return jnp.concatenate(parts, axis=-1)

        gate, up, down = (cast(jax.tree.map(one, stack), dtype) for stack in w)
        return cls((jax.tree.map(side_by_side, gate, up),) if joined else (gate, up), down)


def _ffn(x: jax.Array, w: _Used) -> tuple[jax.Array, jax.Array]:
    """One expert's output [M, D], and gate(x) and up(x) [M, 2F] for the backward pass."""
    gate_up = jnp.concatenate([matmul(x, part) for part in w.gate_up], axis=-1)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return matmul(hidden, w.down).astype(x.dtype), gate_up.astype(x.dtype)


def _ffn_backward(
    x: jax.Array, gate_up: jax.Array, w: Any, g: jax.Array
) -> tuple[jax.Array, _Used]:
    """Gradients of `_ffn` with concatenated weights: d_x in the dtype of x, d_w in float32."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_hidden = product("MD,FD->MF", g, w.down)
    d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
    d_gate_up = jnp.concatenate([d_gate, d_hidden * silu], axis=-1).astype(x.dtype)
    dx = product("MF,DF->MD", d_gate_up, w.gate_up[0]).astype(x.dtype)
    dw = _Used(
        gate_up=(product("MD,MF->DF", x, d_gate_up),),
        down=product("MF,MD->FD", (silu * up).astype(x.dtype), g),
    )
    return dx, dw


class _Groups(NamedTuple):
    """The rows of each expert.

    Attributes:
      active: int32[E], all experts, those that have rows first.
      n_active: int32[], number of experts that have rows.
      start: int32[E], first row of each expert.
      size: int32[E], number of rows of each expert.
    """

    active: jax.Array
    n_active: jax.Array
    start: jax.Array
    size: jax.Array

    @classmethod
    def of(cls, size: jax.Array) -> "_Groups":
        active = jnp.argsort(size == 0, stable=True)
        return cls(active, jnp.sum(size > 0), jnp.cumsum(size) - size, size)

    def blocks(self, expert: jax.Array, block: int) -> jax.Array:
        return -(-self.size[expert] // block)


def _rows(x_PD: jax.Array, start: jax.Array, block: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_PD, start, block)


def _put(x_PD: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_PD, rows, start, axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped_ffn(x_PD, w, group_sizes, first, block):
    """Applies expert e to its `group_sizes[e]` consecutive rows, block by block."""
    return _blocks_forward(x_PD, w, group_sizes, first, block, keep=False)[0]


def _grouped_ffn_forward(x_PD, w, group_sizes, first, block):
    out = _blocks_forward(x_PD, w, group_sizes, first, block, keep=True)
    y_PD, gate_up = (checkpoint_name(a, PRODUCT) for a in out)
    return y_PD, (x_PD, gate_up, w, group_sizes, first)


def _blocks_forward(x_PD, w, group_sizes, first, block, keep):
    """Output [P, D] and, if `keep`, gate(x) and up(x) concatenated, [P + block, 2F].

    The last block of an expert may extend into the rows of the next expert, which is computed later
    and overwrites them.  Rows beyond the end are in the padding.
    """
    pairs, groups = x_PD.shape[0], _Groups.of(group_sizes)
    x_PD = jnp.pad(x_PD, ((0, block), (0, 0)))

    def one_expert(a, carry):
        expert = groups.active[a]
        weights = _Used.of(w, first + expert, x_PD.dtype, joined=block >= JOINED_BLOCK)

        def one_block(i, carry):
            start = groups.start[expert] + i * block
            out = _ffn(_rows(x_PD, start, block), weights)
            return tuple(_put(kept, rows, start) for kept, rows in zip(carry, out, strict=False))

        with jax.named_scope(BLOCKS):
            return jax.lax.fori_loop(0, groups.blocks(expert, block), one_block, carry)

    carry = (jnp.zeros_like(x_PD),)
    if keep:
        carry += (jnp.zeros((x_PD.shape[0], 2 * w.gate.shape[-1]), x_PD.dtype),)
    with jax.named_scope(ACTIVE):
        y_PD, *gate_up = jax.lax.fori_loop(0, groups.n_active, one_expert, carry)
    return y_PD[:pairs], *gate_up


def _grouped_ffn_backward(block, residuals, g_PD):
    """The loop of the forward pass; the gradients of an expert's weights are written once."""
    x_PD, gate_up_PF, w, group_sizes, first = residuals
    pairs, groups, ffn = x_PD.shape[0], _Groups.of(group_sizes), w.gate.shape[-1]
    x_PD, g_PD = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_PD, g_PD))

    def one_expert(a, carry):
        dx_PD, dw = carry
        expert = groups.active[a]
        weights = _Used.of(w, first + expert, x_PD.dtype, joined=True)

        def one_block(i, carry):
            dx_PD, dw_expert = carry
            start = groups.start[expert] + i * block
            in_group = (i * block + jnp.arange(block) < groups.size[expert])[:, None]
            g = jnp.where(in_group, _rows(g_PD, start, block), 0)
            x, gate_up = _rows(x_PD, start, block), _rows(gate_up_PF, start, block)
            dx, dw_block = _ffn_backward(x, gate_up, weights, g)
            return _put(dx_PD, dx, start), jax.tree.map(jnp.add, dw_expert, dw_block)

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), weights)
        blocks = groups.blocks(expert, block)
        with jax.named_scope(BLOCKS):
            dx_PD, ((gate_up,), down) = jax.lax.fori_loop(0, blocks, one_block, (dx_PD, zeros))
        parts = ExpertWeights(gate_up[:, :ffn], gate_up[:, ffn:], down)
        dw = jax.tree.map(lambda d, e: d.at[first + expert].set(e.astype(d.dtype)), dw, parts)
        return dx_PD, dw

    initial = (jnp.zeros_like(x_PD), jax.tree.map(jnp.zeros_like, w))
    with jax.named_scope(ACTIVE):
        dx_PD, dw = jax.lax.fori_loop(0, groups.n_active, one_expert, initial)
    return dx_PD[:pairs], dw, None, None


_grouped_ffn.defvjp(_grouped_ffn_forward, _grouped_ffn_backward)
