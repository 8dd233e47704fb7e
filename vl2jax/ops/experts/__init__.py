"""Routed experts: the weighted sum of each token's chosen experts (DeepSeek-V2, Eq. 20).

`reference.py` computes every expert on every token.  `xla.py` sorts tokens by expert and loops over
the experts that have tokens.  `tpu.py` uses grouped matrix products (megablox), and `tpu_int8.py`
one of its own for int8 weights.  On a mesh, `sharded.py` implements expert parallelism and
`exchange.py` the communication.  No implementation drops tokens.

Suffixes: T tokens, K experts per token, D width.
"""

import jax

from vl2jax.ops.experts import reference, tpu, tpu_int8, xla
from vl2jax.ops.experts.weights import ExpertWeights
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["AUTO", "IMPLEMENTATIONS", "ExpertWeights", "routed_experts"]

_EXPERTS = Operation(
    "experts",
    Implementation("int8", tpu_int8.int8_experts, ("tpu",), tpu_int8.unsupported),
    Implementation("gmm", tpu.gmm, ("tpu",), tpu.unsupported),
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
    """Computes the chosen experts of each token and adds them up, weighted, in float32.

    An expert is `down(silu(gate(x)) * up(x))`.

    Args:
      x_TD: tokens.
      weights_TK: float32, gate values of the chosen experts.
      experts_TK: int32, ids of the chosen experts.  The id E means no expert, for experts on
        another device; its gate value must be 0.
      w: weights of E experts, or of the experts of several layers one after the other.  The
        weights of an expert are cast to the dtype of x when it is computed.
      first: index of this layer's expert 0 in w.
      n_experts: E; None: all experts in w.
      implementation: a name in `IMPLEMENTATIONS`, tried first; "auto": chosen by platform and
        arguments.  An implementation requested with `ops.use` takes precedence.

    Returns:
      [T, D] in the dtype of x.
    """
    prefer = None if implementation == AUTO else implementation
    where = {"first": first, "n_experts": n_experts}
    return _EXPERTS(x_TD, weights_TK, experts_TK, w, prefer=prefer, **where)
