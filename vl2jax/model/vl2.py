"""The whole model: maps image tiles and tokens to logits.

Axis legend: B rows, T tokens, G tile pools, I tiles of all pools, Q tokens per tile, D width.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config, required
from vl2jax.model.adaptor import Adaptor
from vl2jax.model.decoder import Caches, Decoder
from vl2jax.model.layers import REMAT
from vl2jax.model.moe import Balance
from vl2jax.model.parameter import parameter, shapes_only
from vl2jax.model.vision import VisionTower
from vl2jax.ops.platform import compiling_for, platform_of
from vl2jax.parallel.mesh import BATCH_AXES, constrain, mesh_of
from vl2jax.processing.batch import TEXT, Batch

# Dtypes in which a model can be stored and computed, by name.
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


@flax.struct.dataclass
class Output:
    """Result of a forward pass.

    Attributes:
      hidden: [B, T, D], hidden states after the final norm.
      logits: float32[B, T, vocab], or None if they were not requested.
      balance: load balance of the MoE layers, or None if the model has none.
    """

    hidden: jax.Array
    logits: jax.Array | None
    balance: Balance | None


class VL2(nn.Module):
    """DeepSeek-VL2 (paper section 2).

    Its variables are `params`, and `router` with the correction biases of `noaux_tc` routers.

    Attributes:
      config: architecture.
      dtype: dtype of activations and of the operands of matrix products, which accumulate in
        float32.
      param_dtype: dtype of the parameters that `init` creates.
      moe_implementation: how routed experts are computed, a name in `ops.experts.IMPLEMENTATIONS`.
      max_segments: largest segment id in a batch; 1 if sequences are not packed.
      remat: rematerialisation policy of each layer, a name in `layers.REMAT`.
      tile_pools: G, the number of tile pools in a batch.  Rows and tile slots are split into G
        equal parts; rows of part g use tiles of part g, and their `image_index` counts from its
        start.  With one pool per shard of the batch, no projected tile leaves its device.

    Raises:
      UserError: `remat` is not a name in `layers.REMAT`.
    """

    config: VL2Config
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    moe_implementation: str = "blocked"
    max_segments: int = 1
    remat: str = "none"
    tile_pools: int = 1

    def __post_init__(self):
        if self.remat not in REMAT:
            raise UserError(f"remat is {self.remat!r}; choose one of {', '.join(REMAT)}")
        super().__post_init__()

    def setup(self):
        cfg = self.config
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.vision = VisionTower(cfg.vision, **dtypes, remat=self.remat)
        self.adaptor = Adaptor(cfg.adaptor, **dtypes)
        self.decoder = Decoder(
            cfg.decoder,
            **dtypes,
            moe_implementation=self.moe_implementation,
            max_segments=self.max_segments,
            remat=self.remat,
        )
        width = cfg.adaptor.n_embed
        init = nn.initializers.normal(width**-0.5)
        self.image_newline = parameter(self, "image_newline", init, (width,), self.param_dtype)
        self.view_seperator = parameter(self, "view_seperator", init, (width,), self.param_dtype)

    def image_table(self, tiles: jax.Array) -> jax.Array:
        """Encodes tiles into the table of embeddings that `image_index` points into.

        Args:
          tiles: uint8[I, S, S, 3], S pixels per side; if I is 0, the vision tower is not run.

        Returns:
          [G, 2 + I / G * Q, D]: for each pool image_newline, view_seperator, and the Q rows of each
          of its tiles.
        """
        learned = jnp.stack([self.image_newline, self.view_seperator]).astype(self.dtype)
        learned = jnp.broadcast_to(learned, (self.tile_pools, *learned.shape))
        if tiles.shape[0] == 0:
            return learned
        projected = self.adaptor(self.vision(constrain(tiles, BATCH_AXES)))
        projected = projected.reshape(self.tile_pools, -1, projected.shape[-1])
        return constrain(jnp.concatenate([learned, projected], axis=1), BATCH_AXES)

    def embed(self, table: jax.Array, tokens: jax.Array, image_index: jax.Array) -> jax.Array:
        """Input embeddings: the token embedding of text, the table's row for visual positions.

        Args:
          table: [G, rows, D], see `image_table`.
          tokens: int32[B, T].
          image_index: int32[B, T], see `Batch`.

        Returns:
          [B, T, D].
        """

        def look_up(table: jax.Array, index: jax.Array) -> jax.Array:
            return jnp.take(table, index, axis=0, mode="clip")

        index = image_index.reshape(self.tile_pools, -1)
        visual = jax.vmap(look_up)(table, index).reshape(*image_index.shape, -1)
        x = jnp.where((image_index == TEXT)[..., None], self.embed_tokens(tokens), visual)
        x = constrain(x, BATCH_AXES)
        self.sow("intermediates", "inputs_embeds", x)
        return x

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeds text tokens: int32[B, T] -> [B, T, D]."""
        return self.decoder.embed(tokens)

    def decode(
        self, x: jax.Array, positions: jax.Array, caches: Caches
    ) -> tuple[jax.Array, Caches]:
        """Runs the decoder with a cache, for prefill and decoding.

        Args:
          x: [B, T, D], input embeddings.
          positions: int32[B, T].
          caches: written at `positions`, then attended over.

        Returns:
          Hidden states [B, T, D] after the final norm, and the written caches.
        """
        segments = jnp.ones_like(positions)
        hidden, written, _ = self.decoder(x, positions, segments, caches)
        return hidden, required(written)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the output head: [..., D] -> float32[..., vocab]."""
        return self.decoder.logits(hidden)

    def __call__(
        self,
        batch: Batch,
        balance_ids: jax.Array | None = None,
        with_logits: bool = True,
        padding_counts: bool = True,
    ) -> Output:
        """Runs a forward pass over whole sequences, without a cache.

        Args:
          batch: see `Batch`.
          balance_ids: int32[B, T] or None, see `Decoder`.
          with_logits: whether to compute logits.
          padding_counts: whether the outputs at padding are used; False is faster (see `Context`).
        """
        x = self.embed(self.image_table(batch.tiles), batch.tokens, batch.image_index)
        hidden, _, balance = self.decoder(
            x,
            batch.positions,
            batch.segment_ids,
            balance_ids=balance_ids,
            padding_counts=padding_counts,
        )
        logits = self.logits(hidden) if with_logits else None
        return Output(hidden=hidden, logits=logits, balance=balance)


def compute_dtype(params) -> jnp.dtype:
    """The dtype of the stored weights; computation uses it by default."""
    return params["params"]["image_newline"].dtype


def forward(
    config: VL2Config,
    params,
    batch: Batch,
    *,
    dtype: jnp.dtype | None = None,
    moe_implementation: str = "blocked",
) -> jax.Array:
    """Computes the logits of every position.

    Args:
      config: architecture.
      params: variables of the model, `{"params": ..., "router": ...}`, as `vl2jax.load` returns
        them.  The computation runs on their mesh.
      batch: as a `Processor` returns it.
      dtype: dtype of the computation; None: that of the parameters.
      moe_implementation: a name in `vl2jax.ops.experts.IMPLEMENTATIONS`.

    Returns:
      float32[B, T, vocab]; logits at padding are meaningless.
    """
    dtype = jnp.dtype(dtype or compute_dtype(params))
    with mesh_of(params), compiling_for(platform_of(params)):
        return _forward(config, dtype, moe_implementation, params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(config, dtype, moe_implementation, params, batch) -> jax.Array:
    model = VL2(config, dtype, moe_implementation=moe_implementation)
    output: Any = model.apply(params, batch)
    return output.logits


def init_variables(model: VL2, key: jax.Array) -> dict[str, Any]:
    """Initializes the variables: random `params`, and zero correction biases in `router`, if any.

    Args:
      model: the model.
      key: PRNG key.
    """
    size = model.config.vision.image_size
    integers = jnp.ones((1, 1), jnp.int32)
    batch = Batch(
        tiles=jnp.zeros((1, size, size, 3), jnp.uint8),
        tokens=integers,
        image_index=integers,
        positions=integers,
        segment_ids=integers,
        loss_mask=jnp.ones((1, 1), bool),
    )
    variables = model.clone(tile_pools=1).init(key, batch)
    return {name: variables[name] for name in ("params", "router") if name in variables}


def abstract_params(config: VL2Config, param_dtype=jnp.float32):
    """Shapes and dtypes of all variables; nothing is allocated.

    Args:
      config: architecture.
      param_dtype: dtype of `params`; the router's correction bias is always float32.

    Returns:
      A tree of `jax.ShapeDtypeStruct`.
    """
    variables = jax.tree.map(lambda shape: shape, _abstract_params(config))
    in_dtype = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(param_dtype))
    params = jax.tree.map(lambda leaf: in_dtype(leaf.shape), variables["params"])
    return {**variables, "params": params}


@functools.cache
def _abstract_params(config: VL2Config):
    with shapes_only():
        return jax.eval_shape(lambda: init_variables(VL2(config), jax.random.key(0)))
