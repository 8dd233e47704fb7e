"""How the decoder's layers lie in memory while a program answers: stacked, or each by itself.

Out of a stack of layers, weights and caches alike, XLA's CPU compiler copies what a layer needs
before it computes with it.  With the small caches of MLA no difference was measured, and 27 layers
by themselves compile for five times as long as stacked.
"""

from vl2jax.ops.registry import Implementation, Operation
from vl2jax.parallel.mesh import current_mesh


def _refuses(attention: str) -> str:
    if current_mesh() is not None:
        return "on a mesh"
    return "" if attention == "mha" else "the cache of MLA is small"


_LAYERS = Operation(
    "layers",
    Implementation("unstacked", lambda attention: True, ("cpu",), _refuses),
    Implementation("stacked", lambda attention: False),
)


def unstacked_is_faster(attention: str) -> bool:
    """Whether decoding is faster with the parameters of each layer as arrays of their own.

    Args:
      attention: "mha" or "mla".
    """
    return _LAYERS(attention)
