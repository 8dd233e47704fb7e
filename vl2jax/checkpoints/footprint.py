"""How many bytes a model and its caches take; nothing is allocated."""

import functools
import math

import jax
import jax.numpy as jnp

from vl2jax.config import VL2Config
from vl2jax.model.decoder import init_caches
from vl2jax.model.quantization import quantize_tree
from vl2jax.model.vl2 import abstract_params


def parameter_bytes(config: VL2Config, dtype: jnp.dtype, quantize: str | None = None) -> int:
    """Of all variables as `vl2jax.load` holds them."""
    shapes = abstract_params(config, dtype)
    if quantize == "int8":
        shapes = jax.eval_shape(quantize_tree, shapes)
    return _bytes(shapes)


def cache_bytes(config: VL2Config, dtype: jnp.dtype, rows: int, slots: int) -> int:
    """Of the caches of so many rows of so many tokens."""
    make = functools.partial(init_caches, config.decoder, rows, slots, dtype)
    return _bytes(jax.eval_shape(make))


def _bytes(tree) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
