"""Unstacked layers: each layer has its own parameter and cache arrays, for decoding on CPU.

In a scan over stacked layers, XLA's CPU compiler copies a layer's weights and cache out of the
stacks before it computes with them.  Inference programs therefore split the stacks once, in memory,
if `ops.layer_layout` says that this is faster.  Each layer becomes a run of one layer; nothing else
changes.
"""

from typing import Any

import flax.traverse_util
import jax
import numpy as np

from vl2jax.config import DecoderConfig
from vl2jax.ops.layer_layout import unstacked_is_faster
from vl2jax.parallel.mesh import mesh_of


def are_unstacked(cfg: DecoderConfig, variables: dict) -> bool:
    """Whether the decoder's layers in these variables are unstacked (see `unstack_layers`)."""
    names = {run.name for run in cfg.unstacked_runs}
    return names <= set(variables["params"]["decoder"])


def should_unstack(cfg: DecoderConfig, variables: dict) -> bool:
    """Whether decoding is faster unstacked on the devices of these variables."""
    with mesh_of(variables):
        return unstacked_is_faster("mla" if cfg.use_mla else "mha")


def unstack_layers(cfg: DecoderConfig, variables: dict) -> dict[str, Any]:
    """Splits the decoder's stacks into single layers, named by kind and layer number.

    The given tree is modified: each stack is removed from it before its layers are made.  The
    layers share the stack's memory if its alignment allows; otherwise one stack at a time is
    copied.

    Args:
      cfg: decoder configuration.
      variables: `{"params": ..., "router": ...}`, stacked, on one CPU device; leaves may be pytrees
        (`Int8`).

    Returns:
      `variables`, now for `VL2(config, unstacked_layers=True)`: a stack `decoder/moe_1` [n, ...]
      has become `decoder/moe_1` to `decoder/moe_n`, [1, ...] each.
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
    """One layer [1, ...] of a stack, without a copy if the memory's alignment allows."""
    return jax.device_put(np.asarray(stack)[number : number + 1], may_alias=True)
