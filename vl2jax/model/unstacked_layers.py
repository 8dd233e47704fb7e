"""Unstacked layers: the parameters of each are arrays of their own, for decoding on CPU.

Out of a stack of layers, weights and caches alike, XLA's CPU compiler copies what a layer needs
before it computes with it.  So a program that answers takes the stacks apart, once, in memory,
where `ops.layer_layout` says that it is faster: each layer becomes a run of one layer, and nothing
else changes.
"""

from typing import Any

import flax.traverse_util
import jax
import numpy as np

from vl2jax.config import DecoderConfig
from vl2jax.ops.layer_layout import unstacked_is_faster
from vl2jax.parallel.mesh import mesh_of


def are_unstacked(cfg: DecoderConfig, variables: dict) -> bool:
    """Whether these variables have each layer of the decoder by itself (see `unstack_layers`)."""
    names = {run.name for run in cfg.unstacked_runs}
    return names <= set(variables["params"]["decoder"])


def should_unstack(cfg: DecoderConfig, variables: dict) -> bool:
    """Whether decoding is faster so, where these variables lie; see `ops.layer_layout`."""
    with mesh_of(variables):
        return unstacked_is_faster("mla" if cfg.use_mla else "mha")


def unstack_layers(cfg: DecoderConfig, variables: dict) -> dict[str, Any]:
    """Variables with each layer of the decoder by itself, named by its kind and number.

    The given tree is used up: each stack leaves it before its layers are made.  These lie where the
    stack lay if memory is aligned so; else a stack is copied, one at a time.

    Args:
      cfg: of the decoder.
      variables: `{"params": ..., "router": ...}`, stacked, on one CPU; leaves may be pytrees.

    Returns:
      Variables for `VL2(config, unstacked_layers=True)`: `decoder/moe_1` [n, ...] has become
      `decoder/moe_1` to `decoder/moe_n`, [1, ...] each.
    """
    for collection in variables.values():
        decoder = collection.get("decoder", {})
        for run in cfg.layer_runs:
            stacks = flax.traverse_util.flatten_dict(decoder.pop(run.name, {}))
            layers = [{} for _ in range(run.count)]
            while stacks:
                path, stack = stacks.popitem()
                for i, layer in enumerate(layers):
                    layer[path] = jax.tree.map(lambda a, i=i: _layer(a, i), stack)
            singles = cfg.unstacked_runs[run.first : run.first + run.count]
            for single, layer in zip(singles, layers, strict=True):
                if layer:
                    decoder[single.name] = flax.traverse_util.unflatten_dict(layer)
    return variables


def _layer(stack: jax.Array, number: int) -> jax.Array:
    return jax.device_put(np.asarray(stack)[number : number + 1], may_alias=True)
