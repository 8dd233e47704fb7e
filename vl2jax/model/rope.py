"""Rotary position embedding: angles in float32 always, from integer positions.

The original's four tables: plain, `linear`, `dynamic` (NTK) and `yarn` (modeling_deepseek.py).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vl2jax.config import DecoderConfig, RopeScaling


def inverse_frequencies(cfg: DecoderConfig, seq_len: int) -> np.ndarray:
    """float32[R / 2]: radians per position of each rotated pair.

    Args:
      cfg: decoder configuration.
      seq_len: length of the sequence; `dynamic` stretches the base beyond
        `max_position_embeddings`, every other table ignores it.
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
    kept = _yarn_kept(scaling, dim, base)
    return plain / np.float32(scaling.factor) * (1 - kept) + plain * kept


def _yarn_kept(scaling: RopeScaling, dim: int, base: float) -> np.ndarray:
    """Share of each frequency that YaRN leaves unscaled, 1 for the fast ones (its ramp)."""

    def pair_that_turns(rotations: float) -> float:
        """Index of the pair that makes so many turns over the original context."""
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    return 1 - np.clip(ramp, 0, 1)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature `0.1 m ln(s) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(cfg: DecoderConfig) -> float:
    """What multiplies the scores: 1 / sqrt(width), times YaRN's squared mscale where set (MLA)."""
    scale = cfg.qk_head_dim**-0.5
    scaling = cfg.rope_scaling
    if cfg.use_mla and scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rope_table(
    cfg: DecoderConfig, positions: jax.Array, seq_len: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles.

    Args:
      cfg: decoder configuration.
      positions: int32[B, T].
      seq_len: see `inverse_frequencies`.

    Returns:
      Two float32[B, T, R / 2].
    """
    frequencies = jnp.asarray(inverse_frequencies(cfg, seq_len))
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
    scaling, mscale = cfg.rope_scaling, 1.0
    if scaling is not None and scaling.type == "yarn":
        mscale = yarn_mscale(scaling.factor, scaling.mscale)
        mscale /= yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return jnp.cos(angles) * mscale, jnp.sin(angles) * mscale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Rotates pairs in float32; the result has the first members of all pairs, then the second.

    Args:
      x: [B, T, H, R].
      cos, sin: float32[B, T, R / 2].
      interleaved: pairs are neighbours (2i, 2i + 1), as in MLA; else (i, i + R / 2), as in the
        multi-head attention of Tiny.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
