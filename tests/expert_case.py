"""Inputs for tests of the implementations of the routed experts."""

import jax
import jax.numpy as jnp

from vl2jax.ops.experts import ExpertWeights

T, D, F, E, K = 37, 12, 8, 6, 3


def case(routing: str, dtype=jnp.float32):
    """(x, weights, chosen experts, expert weights); `routing`: "random", "empty" or "one"."""
    keys = jax.random.split(jax.random.key(1), 6)
    x = jax.random.normal(keys[0], (T, D), dtype)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = ExpertWeights(
        *(jax.random.normal(k, s, dtype) / 3 for k, s in zip(keys[1:4], shapes, strict=True))
    )
    chosen = {
        "random": jax.lax.top_k(jax.random.normal(keys[4], (T, E)), K)[1],
        "empty": jax.lax.top_k(jax.random.normal(keys[4], (T, K)), K)[1] + 2,  # 2, 3, 4 alone
        "one": jnp.full((T, K), 4),  # all tokens choose one expert K times
    }[routing]
    return x, jax.nn.softmax(jax.random.normal(keys[5], (T, K))), chosen.astype(jnp.int32), weights
