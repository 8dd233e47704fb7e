"""SigLIP vision tower (paper section 2): maps image tiles to patch features.

Axis legend: I tiles, S pixels per side, P patches, W width, H heads, K head width, L blocks.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl2jax.config import VisionConfig
from vl2jax.model.layers import LayerNorm, Linear, remat_layer
from vl2jax.model.parameter import parameter
from vl2jax.ops.attention import attention
from vl2jax.ops.matmul import einsum
from vl2jax.parallel.mesh import BATCH_AXES, constrain, sharded


def normalize(tiles: jax.Array) -> jax.Array:
    """Maps uint8 pixels to float32 in [-1, 1]: `(x / 255 - 0.5) / 0.5`."""
    return (tiles.astype(jnp.float32) / 255 - 0.5) / 0.5


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches; pixels beyond the last patch are cut off."""

    cfg: VisionConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps pixels [I, S, S, 3] to patch embeddings [I, P, W]."""
        grid, patch, width = self.cfg.grid, self.cfg.patch_size, self.cfg.width
        used = grid * patch
        shape = (patch, patch, 3, width)
        init = nn.initializers.normal(1 / math.sqrt(3 * patch * patch))
        kernel = parameter(self, "kernel", init, shape, self.param_dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (width,), self.param_dtype)
        x = pixels[:, :used, :used].astype(self.dtype)
        x = x.reshape(-1, grid, patch, grid, patch, 3)
        x = einsum("IgphqC,pqCW->IghW", x, kernel)
        x += bias.astype(jnp.float32)[None, None, None]
        return x.reshape(-1, grid * grid, width).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over the patches of a tile, with biases and without a mask."""

    cfg: VisionConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads, width = self.cfg.heads, self.cfg.head_dim
        options: dict[str, Any] = dict(
            use_bias=True, dtype=self.dtype, param_dtype=self.param_dtype
        )
        # Only a mesh that shards heads needs them first; it costs a copy of the weight.
        major = 1 if sharded(heads, "tensor") else 0
        qkv = Linear((3, heads, width), major=major, **options, name="qkv")(x)  # [I, P, 3, H, K]
        q, k, v = (qkv[:, :, i] for i in range(3))
        y = v if self.is_initializing() else attention(q, k, v, width**-0.5)
        return Linear((self.cfg.width,), num_in=2, **options, name="proj")(y)


class MLP(nn.Module):
    """Two linear layers with GELU (tanh approximation) between them."""

    cfg: VisionConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options: dict[str, Any] = dict(
            use_bias=True, dtype=self.dtype, param_dtype=self.param_dtype
        )
        x = Linear((self.cfg.intermediate_size,), **options, name="fc1")(x)
        return Linear((self.cfg.width,), **options, name="fc2")(nn.gelu(x, approximate=True))


class Block(nn.Module):
    """Pre-norm transformer block."""

    cfg: VisionConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        options: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        # Without the constraints, XLA would split features in place of tiles where it saves a
        # little, and gather weights and activations in every block.
        y = Attention(self.cfg, **options, name="attn")(LayerNorm(**options, name="norm1")(x))
        x = constrain(x + y, BATCH_AXES)
        y = MLP(self.cfg, **options, name="mlp")(LayerNorm(**options, name="norm2")(x))
        x = constrain(x + y, BATCH_AXES)
        self.sow("intermediates", "block_out", x)
        return x, None


class VisionTower(nn.Module):
    """Patch embedding, transformer blocks (one stack of parameters, one scan) and a final norm."""

    cfg: VisionConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, tiles: jax.Array) -> jax.Array:
        """Maps tiles uint8[I, S, S, 3] to features [I, P, W] after the final LayerNorm."""
        cfg = self.cfg
        options: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = PatchEmbed(cfg, **options, name="patch_embed")(normalize(tiles))
        self.sow("intermediates", "patch_embed_out", x)
        shape = (cfg.grid**2, cfg.width)
        # Larger than the patch embeddings.  With the usual 1 / sqrt(width), positions would be
        # negligible beside them, and a model trained from scratch would first learn what an image
        # shows and not where it is.
        init = nn.initializers.normal(4.0)
        position = parameter(self, "pos_embed", init, shape, self.param_dtype)
        x = constrain(x + position.astype(self.dtype)[None], BATCH_AXES)
        blocks = nn.scan(
            remat_layer(Block, self.remat),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=cfg.layers,
            check_constancy_invariants=False,  # traces the block once instead of twice
        )
        x, _ = blocks(cfg, **options, name="blocks")(x, None)
        x = LayerNorm(**options, name="norm")(x)
        self.sow("intermediates", "vision_out", x)
        return x
