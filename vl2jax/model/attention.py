"""Multi-head attention (Tiny) and Multi-head Latent Attention (Small, base), one call signature.

Axis legend: n layers of a run, B rows, T query tokens, S cache tokens, D width, H heads,
K head width (MHA), N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C kv_lora_rank.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vl2jax.config import DecoderConfig
from vl2jax.model.layers import Kernel, Linear, RMSNorm, einsum
from vl2jax.model.rope import apply_rope, softmax_scale
from vl2jax.ops.attention.xla import Visibility, attend
from vl2jax.ops.int8 import Weight
from vl2jax.ops.platform import on_cpu
from vl2jax.parallel.mesh import constrain, current_mesh
from vl2jax.parallel.sharding import CACHE_RULES

# The norms inside MLA keep this eps whatever `rms_norm_eps` says (as the original does).
_LATENT_NORM_EPS = 1e-6
# What a cache that is kept as bits holds, and whether float32 is kept so, see `init_cache`.
_OF_BITS = {jnp.dtype(jnp.uint16): jnp.bfloat16, jnp.dtype(jnp.uint32): jnp.float32}
_COPIES_FLOAT32 = jax.__version_info__ < (0, 12)
_FEW = 16  # queries of all heads and rows, see `_absorbed_few`


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers of a run; slot s of a row holds the token at position s.

    Attributes:
      keys, values: [n, B, H, S, K], as products with them want it.
    """

    keys: jax.Array
    values: jax.Array


@flax.struct.dataclass
class LatentCache:
    """What MLA caches: the normed latent and the rotated shared key, C + R values per token.

    Attributes:
      latent: [n, B, S, C + R].
    """

    latent: jax.Array


Cache = KVCache | LatentCache


@flax.struct.dataclass
class Context:
    """What all layers share.

    Attributes:
      positions, segment_ids: int32[B, T], see `Batch`.
      cos, sin: float32[B, T, R / 2], the rotation of each token.
      padding_counts: whether anyone looks at what padding gives: then it is the mean of all values,
        as in the original, which takes all keys.
    """

    positions: jax.Array
    segment_ids: jax.Array
    cos: jax.Array
    sin: jax.Array
    padding_counts: bool = flax.struct.field(pytree_node=False, default=True)

    def visibility(self, cache_slots: int | None) -> Visibility:
        """Causal within the segment; with a cache, every slot up to the query's position."""
        if cache_slots is None:
            return Visibility(
                q_positions=self.positions,
                q_segments=self.segment_ids,
                k_positions=self.positions,
                k_segments=self.segment_ids,
                ordered=not self.padding_counts,
            )
        shape = (self.positions.shape[0], cache_slots)
        return Visibility(
            q_positions=self.positions,
            q_segments=jnp.ones_like(self.positions),
            k_positions=jax.lax.broadcasted_iota(jnp.int32, shape, 1),
            k_segments=jnp.ones(shape, jnp.int32),
            # A chunk that fills the cache begins at its first slot.
            ordered=1 < self.positions.shape[1] == cache_slots,
        )


def init_cache(cfg: DecoderConfig, layers: int, rows: int, slots: int, dtype) -> Cache:
    """Zeros: a cache for `layers` layers, `rows` rows of up to `slots` tokens.

    On CPU bfloat16 is kept as its bits, uint16: to write one token, XLA's compiler would make all
    of the cache float32 and bfloat16 again.  For MHA, so is float32 before jax 0.12: to read a
    cache that it writes in place, it would copy it, three times per token.
    """
    if on_cpu() and dtype == jnp.bfloat16:
        dtype = jnp.uint16
    elif on_cpu() and dtype == jnp.float32 and not cfg.use_mla and _COPIES_FLOAT32:
        dtype = jnp.uint32

    def zeros(name: str, *shape: int) -> jax.Array:
        return constrain(jnp.zeros((layers, rows, *shape), dtype), *CACHE_RULES[name])

    if cfg.use_mla:
        return LatentCache(zeros("latent", slots, cfg.kv_lora_rank + cfg.qk_rope_head_dim))
    heads, width = cfg.num_attention_heads, cfg.qk_head_dim
    return KVCache(*(zeros(name, heads, slots, width) for name in ("keys", "values")))


def _write(stack: jax.Array, layer: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Puts `new` [B, ..., T, K] into slots `positions` of one layer of `stack` [n, B, ..., S, K].

    With T > 1 (a prefill chunk) all rows start at the same position.  What a row that is done
    writes beyond the last slot is lost, or on CPU replaces that slot.
    """
    new = _as_stored(new, stack.dtype)
    between = (0,) * (new.ndim - 3)
    if new.shape[-2] > 1:
        return jax.lax.dynamic_update_slice(
            stack, new[None], (layer, 0, *between, positions[0, 0], 0)
        )
    rows = jnp.arange(new.shape[0])
    if not on_cpu() or current_mesh() is not None:
        at = stack.at[layer, rows, ..., positions[:, 0], :]
        return at.set(new[..., 0, :], mode="drop")

    def put(row: jax.Array, stack: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_slice_in_dim(new, row, 1)[None]
        start = (layer, row, *between, positions[row, 0], 0)
        return jax.lax.dynamic_update_slice(stack, one, start)

    # In place, where a scatter would go through all of `stack`; and not fused with what reads it,
    # which would write all of it anew.
    stack = jax.lax.fori_loop(0, len(rows), put, stack, unroll=min(len(rows), 8))
    return jax.lax.optimization_barrier(stack)


def _as_stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Values in the dtype of a cache, see `init_cache`."""
    if dtype not in _OF_BITS:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x.astype(_OF_BITS[dtype]), dtype)


def _as_read(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `_as_stored`."""
    if x.dtype in _OF_BITS:
        x = jax.lax.bitcast_convert_type(x, _OF_BITS[x.dtype])
    return x.astype(dtype)


class MHA(nn.Module):
    """Multi-head attention with half-split RoPE (Tiny)."""

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: KVCache | None, layer: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, D] -> [B, T, D]; a given cache is written first, then attended to."""
        cfg = self.cfg
        kinds = dict(
            use_bias=cfg.attention_bias,
            init=nn.initializers.normal(cfg.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        heads = (cfg.num_attention_heads, cfg.qk_head_dim)
        q, k, v = (Linear(heads, **kinds, name=f"{part}_proj")(x) for part in "qkv")
        q = apply_rope(q, context.cos, context.sin, interleaved=False)
        k = apply_rope(k, context.cos, context.sin, interleaved=False)
        slots = None
        if cache is not None:
            keys = _write(cache.keys, layer, k.swapaxes(1, 2), context.positions)
            values = _write(cache.values, layer, v.swapaxes(1, 2), context.positions)
            cache, slots = KVCache(keys, values), keys.shape[-2]
            k, v = (_as_read(a[layer], self.dtype).swapaxes(1, 2) for a in (keys, values))
        y = v  # will do where only the parameters are wanted
        if not self.is_initializing():
            y = attend(q, k, v, softmax_scale(cfg), context.visibility(slots))
        return Linear((cfg.hidden_size,), num_in=2, **kinds, name="o_proj")(y), cache


class MLA(nn.Module):
    """Multi-head Latent Attention with interleaved RoPE (DeepSeek-V2, Eq. 9-19 and 37-47).

    Training and prefill expand keys and values from the latent; decoding one token per row is
    absorbed: the query moves into the latent space instead, and the cache is all that is read.

    Attributes:
      absorb: None: absorbed when one token meets a cache; True or False: always or never.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    absorb: bool | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LatentCache | None, layer: jax.Array
    ) -> tuple[jax.Array, LatentCache | None]:
        """[B, T, D] -> [B, T, D]; a given cache is written first, then attended to."""
        cfg = self.cfg
        kinds = dict(
            init=nn.initializers.normal(cfg.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        heads, nope, rank = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank

        def norm(name: str) -> RMSNorm:
            return RMSNorm(_LATENT_NORM_EPS, self.dtype, self.param_dtype, name=name)

        query, query_name = x, "q_proj"
        if cfg.q_lora_rank is not None:
            down = Linear((cfg.q_lora_rank,), use_bias=cfg.attention_bias, **kinds, name="q_a_proj")
            query, query_name = norm("q_a_norm")(down(x)), "q_b_proj"
        q = Linear((heads, cfg.qk_head_dim), **kinds, name=query_name)(query)  # [B, T, H, N + R]
        q_nope, q_rope = jnp.split(q, [nope], axis=-1)
        q_rope = apply_rope(q_rope, context.cos, context.sin, interleaved=True)

        down = Linear(
            (rank + cfg.qk_rope_head_dim,),
            use_bias=cfg.attention_bias,
            **kinds,
            name="kv_a_proj",
        )
        latent, k_rope = jnp.split(down(x), [rank], axis=-1)
        latent = norm("kv_a_norm")(latent)
        k_rope = apply_rope(k_rope[:, :, None], context.cos, context.sin, interleaved=True)
        latent = jnp.concatenate([latent, k_rope[:, :, 0]], axis=-1)  # [B, T, C + R]

        slots, absorb = None, bool(self.absorb)
        if cache is not None:
            stack = _write(cache.latent, layer, latent, context.positions)
            cache, slots = LatentCache(stack), stack.shape[-2]
            latent = _as_read(stack[layer], self.dtype)  # [B, S, C + R]
            absorb = x.shape[1] == 1 if self.absorb is None else self.absorb

        shape = (rank, heads, nope + cfg.v_head_dim)
        w_kv_b = Kernel(shape, kinds["init"], self.param_dtype, name="kv_b_proj")()
        attention = _absorbed if absorb else _expanded
        visibility = context.visibility(slots)
        y = attention(q_nope, q_rope, latent, w_kv_b, softmax_scale(cfg), visibility)
        out = Linear(
            (cfg.hidden_size,), num_in=2, use_bias=cfg.attention_bias, **kinds, name="o_proj"
        )
        return out(y), cache


def _expanded(q_nope, q_rope, latent, w_kv_b, scale, visibility) -> jax.Array:
    """Keys and values of every head are computed from the latent: few flops per query."""
    rank, nope = w_kv_b.shape[0], q_nope.shape[-1]
    latent, k_rope = jnp.split(latent, [rank], axis=-1)
    kv = _einsum("BSC,CHX->BSHX", latent, w_kv_b)
    k_nope, v = jnp.split(kv, [nope], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    return attend(q, jnp.concatenate([k_nope, k_rope], axis=-1), v, scale, visibility)


def _absorbed(q_nope, q_rope, latent, w_kv_b, scale, visibility) -> jax.Array:
    """W_UK goes into the query and W_UV into the output: nothing is expanded per cached token."""
    rank, nope = w_kv_b.shape[0], q_nope.shape[-1]
    if on_cpu() and current_mesh() is None and q_nope.shape[0] * q_nope.shape[2] <= _FEW:
        return _absorbed_few(q_nope, q_rope, latent, w_kv_b, scale, visibility)
    w_uk = jax.tree.map(lambda a: a[..., :nope], w_kv_b)
    w_uv = jax.tree.map(lambda a: a[..., nope:], w_kv_b)
    q = jnp.concatenate([_einsum("BTHN,CHN->BTHC", q_nope, w_uk), q_rope], axis=-1)
    y = attend(q, latent[:, :, None], latent[:, :, None, :rank], scale, visibility)
    return _einsum("BTHC,CHV->BTHV", y, w_uv)


def _absorbed_few(q_nope, q_rope, latent, w_kv_b, scale, visibility) -> jax.Array:
    """The same as products without a batch axis: each head's query meets the weights of all heads,
    zeros in the place of theirs.

    Where there are few queries this costs less than bringing the weights' heads to the front,
    which XLA's CPU compiler does for a product by heads, anew for every token.
    """
    rows, length, heads, nope = q_nope.shape
    rank, width = w_kv_b.shape[0], w_kv_b.shape[-1]
    own = jnp.eye(heads, dtype=q_nope.dtype)[None, None, :, :, None]
    w = jax.tree.map(lambda a: a.reshape(a.shape[0], -1), w_kv_b)
    padded = jnp.pad(q_nope, ((0, 0), (0, 0), (0, 0), (0, width - nope)))
    spread = (padded[..., None, :] * own).reshape(-1, heads * width)
    q = _einsum("MX,CX->MC", spread, w).reshape(rows, length, heads, rank)
    q = jnp.concatenate([q, q_rope], axis=-1)
    y = attend(q, latent[:, :, None], latent[:, :, None], scale, visibility)[..., :rank]
    y = _einsum("MC,CX->MX", y.reshape(-1, rank), w).reshape(rows, length, heads, heads, width)
    return jnp.sum(y[..., nope:] * own, axis=-2)


def _einsum(equation: str, x: jax.Array, w: Weight) -> jax.Array:
    """`einsum` in the dtype of x."""
    return einsum(equation, x, w).astype(x.dtype)
