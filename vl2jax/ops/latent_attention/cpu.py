"""Absorbed attention of few queries on CPU, with matrix products that have no batch axis.

For a product per head, XLA's CPU compiler transposes the weight so that heads come first, again for
every token.  Here each head's query is padded with zeros to the width of all heads and multiplied
by the weights of all heads.  For few queries the additional multiplications cost less than the
transpose.

Axis legend: M rows, queries and heads; C latent width; X all heads' key and value widths.
"""

import jax
import jax.numpy as jnp

from vl2jax.ops.attention import Visibility
from vl2jax.ops.attention import attention as attend
from vl2jax.ops.matmul import Weight, einsum
from vl2jax.parallel.mesh import current_mesh

MOST = 16  # largest supported number of rows times heads


def refuses(q_nope: jax.Array, *_) -> str:
    """Supports a single device and few queries."""
    if current_mesh() is not None:
        return "on a mesh"
    few = q_nope.shape[0] * q_nope.shape[2] <= MOST
    return "" if few else f"more than {MOST} queries of all heads and rows"


def attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    w_kv_b: Weight,
    scale: float,
    visibility: Visibility,
) -> jax.Array:
    """Same arguments and result as `ops.latent_attention.absorbed_attention`."""
    rows, length, heads, nope = q_nope.shape
    rank, width, dtype = w_kv_b.shape[0], w_kv_b.shape[-1], q_nope.dtype
    own = jnp.eye(heads, dtype=dtype)[None, None, :, :, None]
    w = jax.tree.map(lambda a: a.reshape(a.shape[0], -1), w_kv_b)
    padded = jnp.pad(q_nope, ((0, 0), (0, 0), (0, 0), (0, width - nope)))
    spread = (padded[..., None, :] * own).reshape(-1, heads * width)
    q = einsum("MX,CX->MC", spread, w).astype(dtype).reshape(rows, length, heads, rank)
    q = jnp.concatenate([q, q_rope], axis=-1)
    y = attend(q, latent[:, :, None], latent[:, :, None], scale, visibility)[..., :rank]
    y = einsum("MC,CX->MX", y.reshape(-1, rank), w).astype(dtype)
    y = y.reshape(rows, length, heads, heads, width)
    return jnp.sum(y[..., nope:] * own, axis=-2)
