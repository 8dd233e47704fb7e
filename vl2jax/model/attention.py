"""Multi-head attention (MHA, VL2-Tiny) and Multi-head Latent Attention (MLA, Small and base).

Both classes have the same call signature.

Axis legend: n layers of a run, B rows, T query tokens, S cache tokens, D width, H heads,
K head width (MHA), N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C kv_lora_rank.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vl2jax.config import DecoderConfig, required
from vl2jax.model.layers import Kernel, Linear, RMSNorm
from vl2jax.model.rope import apply_rope, softmax_scale
from vl2jax.ops import cache as cache_ops
from vl2jax.ops.attention import Visibility, attention
from vl2jax.ops.latent_attention import absorbed_attention
from vl2jax.ops.matmul import einsum
from vl2jax.parallel.mesh import constrain
from vl2jax.parallel.sharding import CACHE_RULES

# As in the original, the norms inside MLA use this eps and not `rms_norm_eps`.
_LATENT_NORM_EPS = 1e-6


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers of a run; slot s of a row holds the token at position s.

    Attributes:
      keys, values: [n, B, H, S, K].  Heads come before slots, the layout that the matrix products
        of attention read.
    """

    keys: jax.Array
    values: jax.Array


@flax.struct.dataclass
class LatentCache:
    """MLA's cache of all layers of a run; slot s of a row holds the token at position s.

    Attributes:
      latent: [n, B, S, C + R], the latent after its norm and the rotated key that all heads share.
    """

    latent: jax.Array


Cache = KVCache | LatentCache


@flax.struct.dataclass
class Context:
    """Inputs that are the same for all layers.

    Attributes:
      positions, segment_ids: int32[B, T], see `Batch`.
      cos, sin: float32[B, T, R / 2], RoPE rotation of each token.
      padding_counts: whether the outputs at padding are used.  True: a padding query gets the mean
        of the values of all keys, as in the original.  False: attention may skip keys that no other
        query sees, and outputs at padding are arbitrary.
    """

    positions: jax.Array
    segment_ids: jax.Array
    cos: jax.Array
    sin: jax.Array
    padding_counts: bool = flax.struct.field(pytree_node=False, default=True)

    def visibility(self, cache_slots: int | None) -> Visibility:
        """Which keys each query sees.

        Without a cache: earlier tokens of the same segment, and the token itself.  With a cache of
        `cache_slots` slots: every slot up to the position of the query.
        """
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
            # A chunk as long as the cache starts at slot 0, so query i and key i are one token.
            ordered=1 < self.positions.shape[1] == cache_slots,
        )


def init_cache(cfg: DecoderConfig, layers: int, rows: int, slots: int, dtype) -> Cache:
    """Makes a cache of zeros for `layers` layers and `rows` rows of `slots` tokens each."""
    dtype = cache_ops.stored_dtype(dtype)

    def zeros(name: str, *shape: int) -> jax.Array:
        return constrain(jnp.zeros((layers, rows, *shape), dtype), *CACHE_RULES[name])

    if cfg.use_mla:
        return LatentCache(
            zeros("latent", slots, required(cfg.kv_lora_rank) + cfg.qk_rope_head_dim)
        )
    heads, width = cfg.num_attention_heads, cfg.qk_head_dim
    return KVCache(*(zeros(name, heads, slots, width) for name in ("keys", "values")))


class MHA(nn.Module):
    """Multi-head attention with half-split RoPE (VL2-Tiny; DeepSeek-V2, Eq. 1-8)."""

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: KVCache | None, layer: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends over the batch itself, or over a cache after writing the new tokens to it.

        Args:
          x: [B, T, D].
          context: see `Context`.
          cache: of all layers of the run; None: no cache.
          layer: int32[], index of the layer in its run.

        Returns:
          [B, T, D] and the written cache, or None.
        """
        cfg = self.cfg
        options: dict[str, Any] = dict(
            use_bias=cfg.attention_bias,
            kernel_init=nn.initializers.normal(cfg.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        heads = (cfg.num_attention_heads, cfg.qk_head_dim)
        q, k, v = (Linear(heads, **options, name=f"{part}_proj")(x) for part in "qkv")
        q = apply_rope(q, context.cos, context.sin, interleaved=False)
        k = apply_rope(k, context.cos, context.sin, interleaved=False)
        slots = None
        if cache is not None:
            keys = cache_ops.write(cache.keys, layer, k.swapaxes(1, 2), context.positions)
            values = cache_ops.write(cache.values, layer, v.swapaxes(1, 2), context.positions)
            cache, slots = KVCache(keys, values), keys.shape[-2]
            k, v = (cache_ops.read(a[layer], self.dtype).swapaxes(1, 2) for a in (keys, values))
        y = v  # has the right shape; `init` needs only the parameters
        if not self.is_initializing():
            y = attention(q, k, v, softmax_scale(cfg), context.visibility(slots))
        return Linear((cfg.hidden_size,), num_in=2, **options, name="o_proj")(y), cache


class MLA(nn.Module):
    """Multi-head Latent Attention with interleaved RoPE (DeepSeek-V2, Eq. 9-19 and 37-47).

    Training and prefill expand the latent to keys and values.  Decoding one token per row absorbs
    the expansion instead: it projects the query into the latent space and attends over the cached
    latents, which are never expanded.

    Attributes:
      absorb: True or False: whether to absorb.  None: absorb if there is a cache and one token per
        row.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    absorb: bool | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LatentCache | None, layer: jax.Array
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attends over the batch itself, or over a cache after writing the new tokens to it.

        Args:
          x: [B, T, D].
          context: see `Context`.
          cache: of all layers of the run; None: no cache.
          layer: int32[], index of the layer in its run.

        Returns:
          [B, T, D] and the written cache, or None.
        """
        cfg = self.cfg
        options: dict[str, Any] = dict(
            kernel_init=nn.initializers.normal(cfg.initializer_range),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        heads, nope, rank = (
            cfg.num_attention_heads,
            cfg.qk_nope_head_dim,
            required(cfg.kv_lora_rank),
        )

        def norm(name: str) -> RMSNorm:
            return RMSNorm(_LATENT_NORM_EPS, self.dtype, self.param_dtype, name=name)

        query, query_name = x, "q_proj"
        if cfg.q_lora_rank is not None:
            down = Linear(
                (cfg.q_lora_rank,), use_bias=cfg.attention_bias, **options, name="q_a_proj"
            )
            query, query_name = norm("q_a_norm")(down(x)), "q_b_proj"
        q = Linear((heads, cfg.qk_head_dim), **options, name=query_name)(query)  # [B, T, H, N + R]
        q_nope, q_rope = jnp.split(q, [nope], axis=-1)
        q_rope = apply_rope(q_rope, context.cos, context.sin, interleaved=True)

        down = Linear(
            (rank + cfg.qk_rope_head_dim,),
            use_bias=cfg.attention_bias,
            **options,
            name="kv_a_proj",
        )
        latent, k_rope = jnp.split(down(x), [rank], axis=-1)
        latent = norm("kv_a_norm")(latent)
        k_rope = apply_rope(k_rope[:, :, None], context.cos, context.sin, interleaved=True)
        latent = jnp.concatenate([latent, k_rope[:, :, 0]], axis=-1)  # [B, T, C + R]

        slots, absorb = None, bool(self.absorb)
        if cache is not None:
            stack = cache_ops.write(cache.latent, layer, latent, context.positions)
            cache, slots = LatentCache(stack), stack.shape[-2]
            latent = cache_ops.read(stack[layer], self.dtype)  # [B, S, C + R]
            absorb = x.shape[1] == 1 if self.absorb is None else self.absorb

        shape = (rank, heads, nope + cfg.v_head_dim)
        w_kv_b = Kernel(shape, options["kernel_init"], self.param_dtype, name="kv_b_proj")()
        attend = absorbed_attention if absorb else _expanded
        visibility = context.visibility(slots)
        y = attend(q_nope, q_rope, latent, w_kv_b, softmax_scale(cfg), visibility)
        out = Linear(
            (cfg.hidden_size,), num_in=2, use_bias=cfg.attention_bias, **options, name="o_proj"
        )
        return out(y), cache


def _expanded(q_nope, q_rope, latent, w_kv_b, scale, visibility) -> jax.Array:
    """Attention with keys and values of every head expanded from the latent."""
    rank, nope = w_kv_b.shape[0], q_nope.shape[-1]
    latent, k_rope = jnp.split(latent, [rank], axis=-1)
    kv = einsum("BSC,CHX->BSHX", latent, w_kv_b).astype(latent.dtype)
    k_nope, v = jnp.split(kv, [nope], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    return attention(q, jnp.concatenate([k_nope, k_rope], axis=-1), v, scale, visibility)
