"""Stochastic rounding, so that bfloat16 parameters are trained at small learning rates.

A bfloat16 number has 8 significant bits.  If the sum of a parameter and its update were rounded to
the nearest bfloat16 number, updates below 1/512 of the parameter would vanish.  Stochastic rounding
goes up or down at random, with the probabilities that keep the mean: E[round(x)] = x (Gupta et al.
2015, "Deep Learning with Limited Numerical Precision", Section 3).

The random bits are a hash of the run's seed, the step, the path of the parameter and the index of
the element.  So a resumed run, and a run on another mesh, draw the same ones.  `jax.random.bits`
would give such bits too, but with threefry: eight times the time and 16 bytes per element on CPU,
and seconds of compilation per parameter on TPU.
"""

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_INFINITY, _QUIET = 0x7F80, 0x40  # bits of bfloat16: infinity, and the one that a quiet NaN has


def round_to_bfloat16(x: jax.Array, seed: jax.Array | int) -> jax.Array:
    """Rounds stochastically: up with a probability of (x - lower) / (upper - lower).

    `lower` and `upper` are the bfloat16 numbers around x, so a number that bfloat16 has is not
    changed.  Infinities and NaN stay.  A finite number stays finite: beyond the largest bfloat16
    number it is rounded to that.

    Args:
      x: float32, of any shape.
      seed: uint32[].

    Returns:
      bfloat16, in the shape of `x`.
    """
    # The upper half of the bits of x is x rounded towards 0.  Adding 16 random bits to the lower
    # half carries into the upper one with a probability of lower half / 2^16.  All is done with
    # integers, because CPUs and TPUs flush denormal numbers to 0.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (bits + (_random_bits(seed, x.shape) >> 16)) >> 16
    rounded -= jnp.where(rounded & 0x7FFF == _INFINITY, jnp.uint32(1), jnp.uint32(0))
    special = (bits >> 16) | jnp.where(jnp.isnan(x), jnp.uint32(_QUIET), jnp.uint32(0))
    chosen = jnp.where(jnp.isfinite(x), rounded, special).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(chosen, jnp.bfloat16)


def apply_updates(
    params: Mapping[str, jax.Array], updates: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
    """Adds updates to parameters in float32; rounds bfloat16 parameters stochastically.

    Args:
      params: parameters by path, float32 or bfloat16.
      updates: float32, by path.  Where an update is 0, the parameter keeps its bits.
      key: random key of the step.

    Returns:
      The new parameters by path, in their dtypes.
    """
    seed = jax.random.bits(key, (), jnp.uint32)

    def add(path: str) -> jax.Array:
        param, update = params[path], updates[path]
        if param.dtype != jnp.bfloat16:
            return (param + update).astype(param.dtype)
        own_seed = seed ^ jnp.uint32(zlib.crc32(path.encode()))
        rounded = round_to_bfloat16(param.astype(jnp.float32) + update, own_seed)
        return jnp.where(update == 0, param, rounded)

    return {path: add(path) for path in params}


def _random_bits(seed: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """uint32 of a shape: a hash of the seed and the indices, one axis after the other.

    Each step of the hash is a bijection of uint32.  So each element is uniform over the seeds, and
    the rounding exactly unbiased.
    """
    state = _hash(jnp.asarray(seed, jnp.uint32))
    for axis, size in enumerate(shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, (1,) * axis + (size,), axis)
        state = _hash(state[..., None] + index)
    return state


def _hash(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
