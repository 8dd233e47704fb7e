"""Auxiliary-loss-free load balancing of the experts (arXiv 2408.15664) and its metrics.

Axis legend: M MoE layers, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vl2jax.config import DecoderConfig

BIAS = "e_score_correction_bias"


def update_biases(cfg: DecoderConfig, router: dict, load: jax.Array, step_size: float) -> dict:
    """Updates the correction biases: `b += u sign(mean load - load)` (Algorithm 1).

    Args:
      cfg: decoder configuration; it gives the names of the layer stacks.
      router: the `router` collection; empty if the routers have no bias.
      load: float32[M, E], tokens per expert in this step, over all microbatches and devices.
      step_size: u; 0 keeps the biases.

    Returns:
      The updated `router` collection.
    """
    if not router or not step_size:
        return router
    flat: dict[str, Any] = dict(flatten_dict(router, sep="/"))
    direction = jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
    first = 0
    for run in cfg.layer_runs:
        if run.is_moe:
            path = f"decoder/{run.name}/mlp/gate/{BIAS}"
            flat[path] = flat[path] + step_size * direction[first : first + run.count]
            first += run.count
    return unflatten_dict(flat, sep="/")


def balance_metrics(cfg: DecoderConfig, router: dict, load: jax.Array) -> dict[str, jax.Array]:
    """Metrics of the load balance of each layer.

    Args:
      cfg: decoder configuration; it gives the names of the layer stacks.
      router: the `router` collection; empty if the routers have no bias.
      load: float32[M, E], tokens per expert in this step.

    Returns:
      float32[M] each.  `max_violation`: maximum load / mean load - 1 (MaxVio in the paper).
      `entropy`: entropy of the load divided by its maximum, 1 if all loads are equal.
      `dead_experts`: number of experts without tokens.  `bias_norm`: Euclidean norm of the
      correction biases, if the routers have them.
    """
    experts = load.shape[-1]
    mean = jnp.maximum(jnp.mean(load, axis=-1, keepdims=True), 1e-9)
    share = load / (mean * experts)
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), axis=-1) / jnp.log(experts)
    metrics = {
        "max_violation": jnp.max(load / mean, axis=-1) - 1,
        "entropy": entropy,
        "dead_experts": jnp.sum(load == 0, axis=-1).astype(jnp.float32),
    }
    if router:
        flat: dict[str, Any] = dict(flatten_dict(router, sep="/"))
        runs = [run.name for run in cfg.layer_runs if run.is_moe]
        biases = jnp.concatenate([flat[f"decoder/{name}/mlp/gate/{BIAS}"] for name in runs])
        metrics["bias_norm"] = jnp.linalg.norm(biases, axis=-1)
    return metrics
