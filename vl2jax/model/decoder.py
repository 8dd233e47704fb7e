"""DeepSeekMoE decoder.

Consecutive layers of one kind (dense or MoE) form a run: one stack of parameters and one `nn.scan`.

Axis legend: B rows, T tokens, S cache slots, D width, E experts, M layers with experts.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl2jax.config import DecoderConfig
from vl2jax.model.attention import MHA, MLA, Cache, Context, init_cache
from vl2jax.model.layers import GatedMLP, Kernel, RMSNorm, remat_layer
from vl2jax.model.moe import EXPERT_STACKS, Balance, MoE
from vl2jax.model.parameter import parameter
from vl2jax.model.rope import rope_table
from vl2jax.ops.matmul import matmul
from vl2jax.parallel.mesh import BATCH_AXES, constrain

Caches = dict[str, Cache]  # by name of the run


def init_caches(cfg: DecoderConfig, rows: int, slots: int, dtype) -> Caches:
    """Makes empty caches of all runs, for `rows` rows of `slots` tokens each."""
    return {run.name: init_cache(cfg, run.count, rows, slots, dtype) for run in cfg.layer_runs}


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer: attention, then a feed-forward network (dense or MoE)."""

    cfg: DecoderConfig
    is_moe: bool
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    moe_implementation: str = "blocked"
    max_segments: int = 1

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],
        layer: jax.Array,
        context: Context,
        balance_ids: jax.Array | None,
    ) -> tuple[tuple[jax.Array, Cache | None], Balance | None]:
        cfg = self.cfg
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        (x, cache), balance = carry, None
        attention: Any = (MLA if cfg.use_mla else MHA)(cfg, **dtypes, name="self_attn")
        normed = RMSNorm(cfg.rms_norm_eps, **dtypes, name="input_layernorm")(x)
        y, cache = attention(normed, context, cache, layer)
        self.sow("intermediates", "attn_out", y)
        x += y
        normed = RMSNorm(cfg.rms_norm_eps, **dtypes, name="post_attention_layernorm")(x)
        if self.is_moe:
            options: dict[str, Any] = dict(
                implementation=self.moe_implementation, max_segments=self.max_segments
            )
            y, balance = MoE(cfg, **dtypes, **options, name="mlp")(normed, balance_ids, layer)
        else:
            init = nn.initializers.normal(cfg.initializer_range)
            y = GatedMLP(cfg.intermediate_size, init, **dtypes, name="mlp")(normed)
        self.sow("intermediates", "mlp_out", y)
        x = constrain(x + y, BATCH_AXES)
        self.sow("intermediates", "layer_out", x)
        return (x, cache), balance


class Decoder(nn.Module):
    """Token embedding, layers, final norm and output head.

    Attributes:
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    moe_implementation: str = "blocked"
    max_segments: int = 1
    remat: str = "none"

    def setup(self):
        cfg = self.cfg
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        init = nn.initializers.normal(cfg.initializer_range)
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, init, **dtypes)
        scan: Any = nn.scan  # Flax annotates `in_axes` as an integer, but accepts a tuple
        self.runs = [
            scan(
                remat_layer(DecoderLayer, self.remat),
                variable_axes={"params": 0, "router": 0, "intermediates": 0},
                variable_broadcast=EXPERT_STACKS,
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=run.count,
                check_constancy_invariants=False,  # traces the layer once instead of twice
            )(
                cfg,
                run.is_moe,
                **dtypes,
                moe_implementation=self.moe_implementation,
                max_segments=self.max_segments,
                name=run.name,
            )
            for run in cfg.layer_runs
        ]
        self.norm = RMSNorm(cfg.rms_norm_eps, **dtypes)
        self.lm_head = Kernel((cfg.hidden_size, cfg.vocab_size), init, self.param_dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds tokens: int32[B, T] -> [B, T, D]."""
        return self.embed_tokens(tokens)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        caches: Caches | None = None,
        balance_ids: jax.Array | None = None,
        padding_counts: bool = True,
    ) -> tuple[jax.Array, Caches | None, Balance | None]:
        """Runs the layers and the final norm.

        Args:
          x: [B, T, D], input embeddings.
          positions, segment_ids: int32[B, T], see `Batch`.
          caches: caches to write the new tokens to and then attend over.  The token at position s
            is written to slot s, and `segment_ids` is ignored.  None: no cache.
          balance_ids: int32[B, T], for the load balance: the segment of each counted token, 0 for
            the others.  None: `segment_ids` without caches; with caches no balance is computed.
          padding_counts: see `Context`.

        Returns:
          Hidden states [B, T, D] after the final norm; the written caches, or None; the `Balance`
          of all MoE layers with leading axis M, or None if none was computed.
        """
        cfg = self.cfg
        # Only `dynamic` RoPE uses the length.  With a cache, positions stay below
        # `max_position_embeddings`, where `dynamic` changes nothing.
        cos, sin = rope_table(cfg, positions, 0 if caches is not None else x.shape[1])
        context = Context(positions, segment_ids, cos, sin, padding_counts)
        if balance_ids is None and caches is None:
            balance_ids = segment_ids
        written, balances = {}, []
        for run, layers in zip(cfg.layer_runs, self.runs, strict=True):
            cache = None if caches is None else caches[run.name]
            layer_indices = jnp.arange(run.count)
            (x, written[run.name]), balance = layers(
                (x, cache), layer_indices, context, balance_ids
            )
            balances += [balance] if run.is_moe else []
        x = self.norm(x)
        self.sow("intermediates", "final_norm", x)
        balance_of_all = (
            jax.tree.map(lambda *a: jnp.concatenate(a), *balances) if balances else None
        )
        return x, None if caches is None else written, balance_of_all

    def logits(self, x: jax.Array) -> jax.Array:
        """Applies the output head: [..., D] -> float32[..., vocab]."""
        y = matmul(x.reshape(-1, x.shape[-1]), self.lm_head())
        return y.reshape(*x.shape[:-1], -1)


class Embedding(nn.Module):
    """Looks up token embeddings: int32[B, T] -> [B, T, D]."""

    vocab_size: int
    features: int
    embedding_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = (self.vocab_size, self.features)
        table = parameter(self, "embedding", self.embedding_init, shape, self.param_dtype)
        # Only the vocabulary stays split: XLA would otherwise gather the tokens of all devices.
        table = constrain(table, "tensor")
        return jnp.take(table, tokens, axis=0, mode="clip").astype(self.dtype)
