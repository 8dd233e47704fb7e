"""Sizes in bytes of a model and its caches, computed from shapes without allocating anything."""

import functools
import math

import jax
import jax.numpy as jnp

from vl2jax.config import VL2Config
from vl2jax.model.decoder import init_caches
from vl2jax.model.quantization import quantize_tree
from vl2jax.model.vl2 import abstract_params


def parameter_bytes(config: VL2Config, dtype: jnp.dtype, quantize: str | None = None) -> int:
    """Bytes of all variables, as `vl2jax.load` keeps them in memory.

    Args:
      config: architecture.
      dtype: dtype of the parameters; the router's correction bias is always float32.
      quantize: see `vl2jax.load`.
    """
    shapes = abstract_params(config, dtype)
    if quantize == "int8":
        shapes = jax.eval_shape(quantize_tree, shapes)
    return _bytes(shapes)


def cache_bytes(config: VL2Config, dtype: jnp.dtype, rows: int, slots: int) -> int:
    """Bytes of the caches of a batch.

    Args:
      config: architecture.
      dtype: dtype of the caches.
      rows: number of sequences.
      slots: tokens per sequence.
    """
    make = functools.partial(init_caches, config.decoder, rows, slots, dtype)
    return _bytes(jax.eval_shape(make))


def _bytes(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
