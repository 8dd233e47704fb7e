"""Memory layout of the decoder's layers for inference: stacked, or one array per layer.

In a scan over stacked layers, XLA's CPU compiler copies a layer's weights and cache out of the
stacks before it computes with them.  With the small cache of MLA this made no measurable
difference, and 27 unstacked layers take five times as long to compile as stacked ones.
"""

from vl2jax.ops.registry import Implementation, Operation
from vl2jax.parallel.mesh import current_mesh


def _refuses(attention: str) -> str:
    """Supports MHA on one device."""
    if current_mesh() is not None:
        return "on a mesh"
    return "" if attention == "mha" else "no gain for MLA"


_LAYERS = Operation(
    "layers",
    Implementation("unstacked", lambda attention: True, ("cpu",), _refuses),
    Implementation("stacked", lambda attention: False),
)


def unstacked_is_faster(attention: str) -> bool:
    """Whether decoding is faster if each layer has its own parameter and cache arrays.

    Args:
      attention: "mha" or "mla".
    """
    return _LAYERS(attention)
