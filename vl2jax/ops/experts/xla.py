"""Routed experts, exact implementations: `dense` (the oracle), `blocked`, and `gmm` for TPU.

Suffixes: T tokens, K experts per token, P = T * K pairs sorted by expert, E experts, D width,
F expert width, M rows of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vl2jax.model.layers import PRODUCT, matmul, product
from vl2jax.ops.experts.cpu import few, serves
from vl2jax.ops.experts.tpu_chunked import CHUNKS, chunked_sum
from vl2jax.ops.experts.tpu_gmm import MAX_ROWS, grouped_ffn
from vl2jax.ops.int8 import Int8, Weight, cast, widen
from vl2jax.ops.platform import on_cpu, on_tpu
from vl2jax.parallel.mesh import axis_size, current_mesh

MAX_BLOCK, JOINED_BLOCK, SMALL_BLOCK, TINY_BLOCK = 256, 64, 16, 4  # rows
ACTIVE, BLOCKS = "active_experts", "expert_blocks"  # in the names of the loops
MIN_SPLIT = 4096  # pairs on a device from which on working in chunks pays


class ExpertWeights(NamedTuple):
    """Weights of all experts of a layer: gate and up [E, D, F], down [E, F, D]."""

    gate: Weight
    up: Weight
    down: Weight


def dense(
    x_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array, w: ExpertWeights
) -> jax.Array:
    """Every expert on every token, then the weighted sum of the chosen ones.

    The oracle: it shares no code with what it judges.
    """
    w = ExpertWeights(*(widen(a, x_TD.dtype) for a in w))
    chosen_TKE = jax.nn.one_hot(experts_TK, w.gate.shape[0], dtype=jnp.float32)
    weights_TE = jnp.einsum("TK,TKE->TE", weights_TK.astype(jnp.float32), chosen_TKE)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden_TEF = jax.nn.silu(einsum("TD,EDF->TEF", x_TD, w.gate))
    hidden_TEF = (hidden_TEF * einsum("TD,EDF->TEF", x_TD, w.up)).astype(x_TD.dtype)
    y_TED = einsum("TEF,EFD->TED", hidden_TEF, w.down).astype(x_TD.dtype)
    return jnp.einsum("TE,TED->TD", weights_TE, y_TED.astype(jnp.float32)).astype(x_TD.dtype)


def blocked(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    w: ExpertWeights,
    block: int | None = None,
    first: jax.Array | int = 0,
    n_experts: int | None = None,
) -> jax.Array:
    """Tokens sorted by expert, then a loop over the blocks that exist: exact, nothing dropped.

    Only weights of experts that got a token are read. The backward pass is a loop of the same
    kind; the ordinary derivative would scatter into the whole weight stack per block.

    Args:
      x_TD: tokens.
      weights_TK: float32, weight of each chosen expert.
      experts_TK: int32, the chosen experts; E: none (its weight must be 0).
      w: weights; those of a used expert are cast to the dtype of x.
      block: rows of a block; None: fitted to the tokens per expert.
      first: where expert 0 lies in w, which may hold the experts of many layers.
      n_experts: E; None: all that w holds.

    Returns:
      The weighted sum [T, D] in the dtype of x, summed in float32.
    """
    n_experts = n_experts or w.gate.shape[0]
    block = block or _block_rows(experts_TK.size, n_experts)

    def run(x_PD: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return _grouped_ffn(x_PD, w, group_sizes, jnp.asarray(first), block)

    return _sorted(run, x_TD, weights_TK, experts_TK, n_experts)


def gmm(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    w: ExpertWeights,
    first: jax.Array | int = 0,
    n_experts: int | None = None,
    chunk: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Tokens sorted by expert, then the grouped products of `experts_gmm`: exact, for TPU.

    Where experts lie on several devices, `experts_chunked` works off the pairs that are here.

    Args as of `blocked`.  The kernels take no int8: such weights of the layer are widened, all of
    its experts.
    """
    if isinstance(w.gate, Int8):
        w, first = _widened(w, first, n_experts or w.gate.shape[0], x_TD.dtype), 0
    n_weights = w.gate.shape[0]
    n_experts = n_experts or n_weights
    mesh = current_mesh()
    places = 1 if mesh is None else axis_size(mesh, "expert")

    def place(group_sizes: jax.Array) -> jax.Array:
        """Within the weights of many layers."""
        if n_weights == n_experts:
            return group_sizes
        none = jnp.zeros(n_weights, group_sizes.dtype)
        return jax.lax.dynamic_update_slice(none, group_sizes, (first,))

    if chunk is None and places > 1 and experts_TK.size // places >= MIN_SPLIT:
        chunk = -(-experts_TK.size // (places * CHUNKS * MAX_ROWS)) * MAX_ROWS
    if chunk is not None:
        flat_P = experts_TK.reshape(-1)
        sizes = place(jnp.bincount(flat_P, length=n_experts))
        order_P = jnp.argsort(flat_P, stable=True)
        return chunked_sum(x_TD, weights_TK, order_P, sizes, w, chunk, n_experts, interpret)
    return _sorted(
        lambda x_PD, group_sizes: grouped_ffn(x_PD, w, place(group_sizes), n_experts, interpret),
        *(x_TD, weights_TK, experts_TK, n_experts),
    )


def _widened(w: ExpertWeights, first, n_experts: int, dtype: jnp.dtype) -> ExpertWeights:
    """One layer's part of int8 weights of many layers, as plain arrays."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=n_experts)
    return ExpertWeights(*(widen(jax.tree.map(cut, stack), dtype) for stack in w))


def automatic(
    x_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array, w: ExpertWeights, **options
) -> jax.Array:
    """`gmm` in a program for TPU, but for few tokens and int8 weights, of which it would widen all
    experts; `few` for few tokens on CPU; else `blocked`."""
    n_experts, int8 = options.get("n_experts") or w.gate.shape[0], isinstance(w.gate, Int8)
    implementation = blocked
    if on_tpu() and not (int8 and experts_TK.size < n_experts):
        implementation = gmm
    if on_cpu() and current_mesh() is None and serves(*experts_TK.shape, n_experts):
        implementation = few
    return implementation(x_TD, weights_TK, experts_TK, w, **options)


# Each takes tokens, weights, experts and their weights; an expert number E stands for none, with
# weight 0, and adds nothing (experts that live on other devices, see `expert_parallel`).
IMPLEMENTATIONS = {"dense": dense, "blocked": blocked, "gmm": gmm, "auto": automatic}


def _sorted(grouped, x_TD, weights_TK, experts_TK, n_experts: int) -> jax.Array:
    """`grouped` (rows by expert, group sizes -> rows) between sorting and the weighted sum."""
    flat_P, top_k = experts_TK.reshape(-1), experts_TK.shape[-1]
    order_P = jnp.argsort(flat_P, stable=True)
    inverse_P = jnp.zeros_like(order_P).at[order_P].set(jnp.arange(flat_P.size))
    group_sizes = jnp.bincount(flat_P, length=n_experts)
    y_PD = grouped(_spread(x_TD, order_P, inverse_P, top_k), group_sizes)
    y_TKD = _permute(y_PD, inverse_P, order_P).reshape(*experts_TK.shape, -1)
    weights_TK = weights_TK.astype(jnp.float32)
    return jnp.einsum("TK,TKD->TD", weights_TK, y_TKD.astype(jnp.float32)).astype(x_TD.dtype)


def _block_rows(pairs: int, n_experts: int) -> int:
    """A power of two near half the mean number of tokens per expert; of few tokens, near all, and
    of very few, near twice as many, so that most experts need one block.

    Half of an expert's last block is padding on average, which smaller blocks make less of.
    """
    mean = -(-pairs // n_experts)
    rows = max(-(-mean // 2), min(mean, SMALL_BLOCK), min(2 * mean, TINY_BLOCK))
    return min(MAX_BLOCK, 1 << (rows - 1).bit_length())


class _Used(NamedTuple):
    """One expert's weights in the compute dtype.

    Attributes:
      gate_up: gate and up [D, F] each, or one beside the other [D, 2F]: a copy, which pays where
        many rows use it.
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
    """One expert: `down(silu(gate(x)) * up(x))`, accumulated in float32; also gate(x) and up(x)."""
    gate_up = jnp.concatenate([matmul(x, part) for part in w.gate_up], axis=-1)
    gate, up = jnp.split(gate_up, 2, axis=-1)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return matmul(hidden, w.down).astype(x.dtype), gate_up.astype(x.dtype)


def _ffn_backward(
    x: jax.Array, gate_up: jax.Array, w: _Used, g: jax.Array
) -> tuple[jax.Array, _Used]:
    """Gradients of `_ffn` with joined weights: of x in its dtype, of the weights in float32."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_TD, order_P, inverse_P, top_k):
    """Row of token t for each of its pairs, sorted by expert; backward is a gather as well."""
    return x_TD[order_P // top_k]


def _spread_forward(x_TD, order_P, inverse_P, top_k):
    return _spread(x_TD, order_P, inverse_P, top_k), inverse_P


def _spread_backward(top_k, inverse_P, g_PD):
    g_TKD = g_PD[inverse_P].reshape(-1, top_k, g_PD.shape[-1])
    return g_TKD.astype(jnp.float32).sum(axis=1).astype(g_PD.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _permute(y_PD, order_P, inverse_P):
    return y_PD[order_P]


_permute.defvjp(
    lambda y_PD, order_P, inverse_P: (y_PD[order_P], inverse_P),
    lambda inverse_P, g_PD: (g_PD[inverse_P], None, None),
)


class _Groups(NamedTuple):
    """Where the rows of each expert lie.

    Attributes:
      active: int32[E], the experts that have rows, first.
      n_active: int32[], how many these are.
      start: int32[E], first row of each expert.
      size: int32[E], its number of rows.
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
    """Expert e on its `group_sizes[e]` consecutive rows, a block at a time."""
    return _blocks_forward(x_PD, w, group_sizes, first, block, keep=False)[0]


def _grouped_ffn_forward(x_PD, w, group_sizes, first, block):
    out = _blocks_forward(x_PD, w, group_sizes, first, block, keep=True)
    y_PD, gate_up = (checkpoint_name(a, PRODUCT) for a in out)
    return y_PD, (x_PD, gate_up, w, group_sizes, first)


def _blocks_forward(x_PD, w, group_sizes, first, block, keep):
    """The result, and where it is to be kept gate(x) and up(x) side by side, [P + block, 2F].

    The last block of an expert may reach into the rows of the next; these are overwritten by
    their own expert, which comes later, and rows past the end fall into padding.
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
    """The same loop; an expert's gradients are written once."""
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
            own = (i * block + jnp.arange(block) < groups.size[expert])[:, None]
            g = jnp.where(own, _rows(g_PD, start, block), 0)
            x, gate_up = _rows(x_PD, start, block), _rows(gate_up_PF, start, block)
            dx, dw_block = _ffn_backward(x, gate_up, weights, g)
            return _put(dx_PD, dx, start), jax.tree.map(jnp.add, dw_expert, dw_block)

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), weights)
        blocks = groups.blocks(expert, block)
        dx_PD, ((gate_up,), down) = jax.lax.fori_loop(0, blocks, one_block, (dx_PD, zeros))
        parts = ExpertWeights(gate_up[:, :ffn], gate_up[:, ffn:], down)
        dw = jax.tree.map(lambda d, e: d.at[first + expert].set(e.astype(d.dtype)), dw, parts)
        return dx_PD, dw

    initial = (jnp.zeros_like(x_PD), jax.tree.map(jnp.zeros_like, w))
    dx_PD, dw = jax.lax.fori_loop(0, groups.n_active, one_expert, initial)
    return dx_PD[:pairs], dw, None, None


_grouped_ffn.defvjp(_grouped_ffn_forward, _grouped_ffn_backward)
