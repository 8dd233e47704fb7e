"""Loss-free balancing of the experts (arXiv 2408.15664) and what a run reports about it.

Axis legend: M layers with experts, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vl2jax.config import DecoderConfig

BIAS = "e_score_correction_bias"


def update_biases(cfg: DecoderConfig, router: dict, load: jax.Array, step_size: float) -> dict:
    """`b += u sign(mean load - load)` for every expert of every layer (Algorithm 1).

    Args:
      cfg: decoder configuration; names the stacks of layers that the biases live in.
      router: the `router` collection; empty where routers have no bias.
      load: float32[M, E], tokens per expert in this step, over all microbatches and devices.
      step_size: u; 0 leaves the biases as they are.
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
    """How evenly each layer used its experts, float32[M] each.

    `max_violation` is the largest load over the mean, minus 1 (MaxVio); `entropy` that of the load
    over its largest possible value, 1 when even; `dead_experts` counts those without a token;
    `bias_norm` is the Euclidean norm of the correction bias.
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
