"""Vision-language adaptor (paper section 2): each 2x2 patches become one token of decoder width.

Axis legend: I tiles, P patches, Q tokens per tile, W vision width, D decoder width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl2jax.config import AdaptorConfig
from vl2jax.model.layers import Linear


def space_to_depth(x: jax.Array, ratio: int) -> jax.Array:
    """Concatenates the features of `ratio` x `ratio` neighbouring patches.

    The patch grid is zero-padded on the right and at the bottom if `ratio` does not divide it.  The
    concatenated features are ordered (channel, row, column), as in `torch.nn.functional.unfold`.

    Args:
      x: [I, P, W]; P must be a square number.
      ratio: side length of a block of patches.

    Returns:
      [I, Q, W * ratio * ratio].
    """
    tiles, patches, width = x.shape
    grid = round(patches**0.5)
    side = -(-grid // ratio)
    pad = side * ratio - grid
    x = jnp.pad(x.reshape(tiles, grid, grid, width), ((0, 0), (0, pad), (0, pad), (0, 0)))
    x = x.reshape(tiles, side, ratio, side, ratio, width)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(tiles, side * side, width * ratio**2)


class Adaptor(nn.Module):
    """Space-to-depth, then an MLP with exact (erf) GELU between its layers."""

    cfg: AdaptorConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps patch features [I, P, W] to tokens [I, Q, D]."""
        x = space_to_depth(x, self.cfg.downsample_ratio)
        for i, (_, features) in enumerate(self.cfg.layer_sizes):
            x = nn.gelu(x, approximate=False) if i else x
            x = Linear(
                (features,),
                use_bias=True,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"layers_{i}",
            )(x)
        self.sow("intermediates", "projector_out", x)
        return x
