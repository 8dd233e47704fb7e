"""Reference implementation of routed experts, independent of the others.

Suffixes: T tokens, K experts per token, E experts, D width, F expert width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vl2jax.ops.experts.weights import ExpertWeights, one_layer
from vl2jax.ops.matmul import product


def dense(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    w: ExpertWeights,
    first: jax.Array | int = 0,
    n_experts: int | None = None,
) -> jax.Array:
    """Computes every expert on every token, then the weighted sum of the chosen ones.

    Same arguments and result as `ops.experts.routed_experts`.
    """
    plain: Any = one_layer(w, first, n_experts or w.gate.shape[0], x_TD.dtype)
    chosen_TKE = jax.nn.one_hot(experts_TK, plain.gate.shape[0], dtype=jnp.float32)
    weights_TE = product("TK,TKE->TE", weights_TK.astype(jnp.float32), chosen_TKE)
    hidden_TEF = jax.nn.silu(product("TD,EDF->TEF", x_TD, plain.gate))
    hidden_TEF = (hidden_TEF * product("TD,EDF->TEF", x_TD, plain.up)).astype(x_TD.dtype)
    y_TED = product("TEF,EFD->TED", hidden_TEF, plain.down).astype(x_TD.dtype)
    return product("TE,TED->TD", weights_TE, y_TED.astype(jnp.float32)).astype(x_TD.dtype)
