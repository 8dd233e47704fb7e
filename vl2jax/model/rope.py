"""Rotary position embedding (RoPE); angles are float32 in every dtype of the model.

Frequencies are plain, or scaled by one of the original's methods: `linear`, `dynamic` (NTK) or
`yarn` (modeling_deepseek.py).

Axis legend: B rows, T tokens, H heads, R rotated width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vl2jax.config import DecoderConfig, RopeScaling


def inverse_frequencies(cfg: DecoderConfig, seq_len: int) -> np.ndarray:
    """Rotation speed of each pair of dimensions.

    Args:
      cfg: decoder configuration.
      seq_len: length of the sequence.  `dynamic` raises the base if it exceeds
        `max_position_embeddings`; the other methods ignore it.

    Returns:
      float32[R / 2], radians per position.
    """
    dim = cfg.qk_rope_head_dim if cfg.use_mla else cfg.qk_head_dim
    scaling = cfg.rope_scaling
    base = cfg.rope_theta
    limit = cfg.max_position_embeddings
    if scaling is not None and scaling.type == "dynamic" and seq_len > limit:
        stretch = scaling.factor * seq_len / limit - (scaling.factor - 1)
        base *= stretch ** (dim / (dim - 2))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = np.float32(1) / np.float32(base) ** exponents
    if scaling is None or scaling.type == "dynamic":
        return plain
    if scaling.type == "linear":
        return plain / np.float32(scaling.factor)
    ramp_mask = _yarn_ramp(scaling, dim, base)
    return plain / np.float32(scaling.factor) * (1 - ramp_mask) + plain * ramp_mask


def _yarn_ramp(scaling: RopeScaling, dim: int, base: float) -> np.ndarray:
    """YaRN's ramp: the weight of each pair's unscaled frequency, 1 for high frequencies."""

    def correction_dim(rotations: float) -> float:
        """Index of the pair that makes this many rotations over the original context."""
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction_dim(scaling.beta_fast)), 0)
    high = min(math.ceil(correction_dim(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    return 1 - np.clip(ramp, 0, 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's magnitude correction `0.1 m ln(s) + 1`, for scaling factor s and weight m."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(cfg: DecoderConfig) -> float:
    """Scale of the attention scores: 1 / sqrt(width), in MLA times the square of YaRN's mscale."""
    scale = cfg.qk_head_dim**-0.5
    scaling = cfg.rope_scaling
    if cfg.use_mla and scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rope_table(
    cfg: DecoderConfig, positions: jax.Array, seq_len: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles, multiplied by YaRN's mscale if it is used.

    Args:
      cfg: decoder configuration.
      positions: int32[B, T].
      seq_len: see `inverse_frequencies`.

    Returns:
      Cosines and sines, float32[B, T, R / 2] each.
    """
    frequencies = jnp.asarray(inverse_frequencies(cfg, seq_len))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    scaling, mscale = cfg.rope_scaling, 1.0
    if scaling is not None and scaling.type == "yarn":
        mscale = yarn_mscale(scaling.factor, scaling.mscale)
        mscale /= yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return jnp.cos(angles) * mscale, jnp.sin(angles) * mscale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates pairs of dimensions, in float32.

    Args:
      x: [B, T, H, R].
      cos, sin: float32[B, T, R / 2].
      interleaved: True: the pairs are (2i, 2i + 1), as in MLA.  False: they are (i, i + R / 2), as
        in the multi-head attention of VL2-Tiny.

    Returns:
      [B, T, H, R] in the dtype of x.  In both cases the first elements of all pairs come before the
      second elements.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
