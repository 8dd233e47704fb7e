"""Reference implementation of routed experts, independent of the others.

Suffixes: T tokens, K experts per token, E experts, D width, F expert width.
"""

import functools

import jax
import jax.numpy as jnp

from vl2jax.ops.experts.weights import ExpertWeights, one_layer


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
    w = one_layer(w, first, n_experts or w.gate.shape[0], x_TD.dtype)
    chosen_TKE = jax.nn.one_hot(experts_TK, w.gate.shape[0], dtype=jnp.float32)
    weights_TE = jnp.einsum("TK,TKE->TE", weights_TK.astype(jnp.float32), chosen_TKE)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    hidden_TEF = jax.nn.silu(einsum("TD,EDF->TEF", x_TD, w.gate))
    hidden_TEF = (hidden_TEF * einsum("TD,EDF->TEF", x_TD, w.up)).astype(x_TD.dtype)
    y_TED = einsum("TEF,EFD->TED", hidden_TEF, w.down).astype(x_TD.dtype)
    return jnp.einsum("TE,TED->TD", weights_TE, y_TED.astype(jnp.float32)).astype(x_TD.dtype)
