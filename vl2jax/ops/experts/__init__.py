"""Routed experts: the weighted sum of each token's chosen experts (DeepSeek-V2, Eq. 20).

`reference.py` computes every expert on every token, `xla.py` loops over the experts that have
tokens, `tpu.py` has grouped products, `cpu.py` is for the one or two tokens of a decoding step.
On a mesh `sharded.py` places the experts, and `exchange.py` moves the tokens.  Nothing is ever
dropped.
"""

import jax

from vl2jax.ops.experts import cpu, reference, tpu, xla
from vl2jax.ops.experts.weights import ExpertWeights
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["AUTO", "IMPLEMENTATIONS", "ExpertWeights", "routed_experts"]

_EXPERTS = Operation(
    "experts",
    Implementation("gmm", tpu.gmm, ("tpu",), tpu.refuses),
    Implementation("few", cpu.few, ("cpu",), cpu.refuses),
    Implementation("blocked", xla.blocked),
    Implementation("dense", reference.dense),
)

AUTO = "auto"
IMPLEMENTATIONS = (*_EXPERTS.implementations, AUTO)


def routed_experts(
    x_TD: jax.Array,
    weights_TK: jax.Array,
    experts_TK: jax.Array,
    w: ExpertWeights,
    *,
    first: jax.Array | int = 0,
    n_experts: int | None = None,
    implementation: str = AUTO,
) -> jax.Array:
    """`down(silu(gate(x)) * up(x))` of the chosen experts, weighted and summed in float32.

    Args:
      x_TD: tokens.
      weights_TK: float32, weight of each chosen expert.
      experts_TK: int32, the chosen experts; E: none (its weight must be 0), for experts that live
        on another device.
      w: weights; those of a used expert are cast to the dtype of x.
      first: where expert 0 lies in w, which may hold the experts of many layers.
      n_experts: E; None: all that w holds.
      implementation: a name in `IMPLEMENTATIONS`; "auto": what suits platform and arguments.
        What `ops.use` asks for goes before it.

    Returns:
      [T, D] in the dtype of x.
    """
    prefer = None if implementation == AUTO else implementation
    where = {"first": first, "n_experts": n_experts}
    return _EXPERTS(x_TD, weights_TK, experts_TK, w, prefer=prefer, **where)
