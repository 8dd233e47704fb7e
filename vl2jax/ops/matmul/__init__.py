"""Products of activations and weights: operands in the activations' dtype, float32 results.

`matmul` is a matrix product, `einsum` any product with a weight, `product` one of two activations.
A weight is an array or `Int8`.  The oracle is `reference.py`.
"""

import jax

from vl2jax.ops.matmul import cpu, reference, xla
from vl2jax.ops.matmul.int8 import Int8, Weight, cast, quantize, widen
from vl2jax.ops.matmul.xla import einsum, product
from vl2jax.ops.registry import Implementation, Operation

__all__ = ["Int8", "Weight", "cast", "einsum", "matmul", "product", "quantize", "widen"]

_MATMUL = Operation(
    "matmul",
    Implementation("cpu", cpu.matmul, ("cpu",), cpu.refuses),
    Implementation("xla", xla.matmul),
    Implementation("reference", reference.matmul),
)


def matmul(x: jax.Array, w: Weight) -> jax.Array:
    """`x w`, accumulated in float32: [M, K] times [K, N] is float32[M, N].

    The weight is cast to the dtype of x; its gradient is not rounded below its own dtype.
    """
    return _MATMUL(x, w)
