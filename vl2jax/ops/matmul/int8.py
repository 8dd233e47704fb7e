"""int8 weights: symmetric weight-only quantisation with one scale per output channel.

A scale is constant along the axes that a matrix product sums over, so it multiplies the result
instead of the weight: `x (q * s) = (x q) * s`.  The integers q, at most 127 in magnitude, are cast
to the dtype of the product when it is computed; they are exact in bfloat16.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.ops.registry import Implementation, Operation

_LARGEST = 127  # -128 is not used, so that the range is symmetric
_SMALLEST = 1e-30  # a channel whose weights are all smaller than this becomes 0


@flax.struct.dataclass
class Int8:
    """A quantised weight `values * scale`; takes the place of an array in the parameter tree.

    It is a pytree: `jax.tree.map` slices, indexes and reshapes it like an array.  In trees of
    shapes, specs or shardings, the fields hold those of `values` and `scale`.

    Attributes:
      values: int8 with the shape of the weight, or the same numbers in the dtype of a computation.
        It is the first field because Flax compares the shape of the first leaf with the model's.
      scale: float32, of size 1 along the axes that matrix products sum over.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return math.prod(self.values.shape)


Weight = jax.Array | Int8


def quantize(weight: jax.Array, axes: tuple[int, ...]) -> Int8:
    """Rounds a weight to int8; the error of an element is at most half its scale.

    If an element is not finite, the scale of its channel becomes NaN or infinite, and so do all
    outputs that depend on it.

    Args:
      weight: an array of a floating-point dtype.
      axes: axes that matrix products sum over.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
    scale = jnp.where(largest < _SMALLEST, 1, largest / _LARGEST)
    values = jnp.clip(jnp.round(weight / scale), -_LARGEST, _LARGEST)
    return Int8(values.astype(jnp.int8), scale)


def dequantize(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """Converts a weight to a plain array of this dtype, with the scale multiplied in."""
    if not isinstance(weight, Int8):
        return weight.astype(dtype)
    return (weight.values.astype(jnp.float32) * weight.scale).astype(dtype)


def cast(weight: Weight, dtype: jnp.dtype) -> Weight:
    """Casts a weight to the dtype of a product; of an int8 weight only the values are cast."""
    if not isinstance(weight, Int8):
        return weight.astype(dtype)
    return dataclasses.replace(weight, values=_cast_values(weight.values, dtype))


def _cast_values(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Converts int8 values to another dtype, exactly."""
    return values if values.dtype == dtype else _WIDEN(values, dtype)


def _convert(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return values.astype(dtype)


def _convert_on_cpu(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Takes bfloat16 from the upper 16 bits of float32.

    XLA's CPU compiler does not vectorize the conversion of int8 to bfloat16, which makes it ten
    times slower.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), dtype)


_WIDEN = Operation(
    "int8_values",
    Implementation(
        *("cpu", _convert_on_cpu, ("cpu",)),
        lambda _, dtype: "" if dtype == jnp.bfloat16 else "not to bfloat16",
    ),
    Implementation("xla", _convert),
)


def scaled_product(product, equation: str, x: jax.Array, w: Int8) -> jax.Array:
    """Computes `product(equation, x, w)` for an int8 weight.

    The scale multiplies the result if the result has the scale's axes.  Otherwise x has them (a
    weight that is used transposed), and the scale multiplies x.

    Args:
      product: an einsum of two operands with a float32 result.
      equation: an einsum equation; the result, or x, must have the scale's axes in the order of w.
      x: activations.
      w: the weight.

    Returns:
      float32, with the axes of the equation's result.
    """
    operands, result = equation.split("->")
    left, right = operands.split(",")
    sizes = dict(zip(right, w.scale.shape, strict=True))
    axes = {name for name, size in sizes.items() if size > 1}

    def scale(names: str) -> jax.Array:
        return w.scale.reshape([sizes.get(name, 1) for name in names])

    values = _cast_values(w.values, x.dtype)
    if axes <= set(result):
        return product(equation, x, values) * scale(result)
    return product(equation, (x * scale(left)).astype(x.dtype), values)


def split_like(weight: Weight, spec: PartitionSpec, axes: tuple[int, ...]):
    """The partition spec of a weight; for an int8 weight, those of its values and its scale.

    Args:
      weight: the weight.
      spec: partition spec of an unquantised weight.
      axes: axes that matrix products sum over; may be negative.
    """
    return Int8(spec, scale_spec(spec, axes)) if isinstance(weight, Int8) else spec


def scale_spec(spec: PartitionSpec, axes: tuple[int, ...]) -> PartitionSpec:
    """The partition spec of a scale: that of its weight, not split along the summed `axes`."""
    names = list(spec)
    for axis in axes:
        names[axis] = None
    return PartitionSpec(*names)


def int8_sharding(sharding: NamedSharding | None, axes: tuple[int, ...]) -> Int8 | None:
    """The shardings of an int8 weight's values and scale, from that of the unquantised weight."""
    if sharding is None:
        return None
    return Int8(sharding, NamedSharding(sharding.mesh, scale_spec(sharding.spec, axes)))
