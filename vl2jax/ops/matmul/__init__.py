"""Matrix products: operands in the activations' dtype, accumulation and results in float32.

`matmul` multiplies activations by a weight, `einsum` is an einsum of activations and a weight, and
`product` an einsum of two activations.  A weight is an array or an `Int8`.
"""

import jax

from vl2jax.ops.matmul import cpu, reference, xla
from vl2jax.ops.matmul.int8 import Int8, Weight, cast, dequantize, quantize
from vl2jax.ops.matmul.xla import einsum, product
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["Int8", "Weight", "cast", "dequantize", "einsum", "matmul", "product", "quantize"]

_MATMUL = Operation(
    "matmul",
    Implementation("cpu", cpu.matmul, ("cpu",), cpu.unsupported),
    Implementation("xla", xla.matmul),
    Implementation("reference", reference.matmul),
)


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """Computes `x w`, accumulated in float32.

    The weight is cast to the dtype of x.  Its gradient is accumulated in float32 and returned in
    the weight's own dtype.

    Args:
      x: [M, K], activations.
      w: [K, N], the weight.

    Returns:
      float32[M, N].
    """
    return _MATMUL(x, w)
