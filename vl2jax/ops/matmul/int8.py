"""int8 weights: symmetric, one scale per output channel, widened where they are used.

A scale belongs to what a product does not sum over, so the product is multiplied and not the
weight: `x (q * s) = (x q) * s`, and q, at most 127, is exact in bfloat16.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.ops.registry import Implementation, Operation

_LARGEST = 127  # -128 is not used: the range is symmetric
_SMALLEST = 1e-30  # channels that are smaller throughout become 0


@flax.struct.dataclass
class Int8:
    """A weight `values * scale`, in the place of an array in the tree of parameters.

    Being a pytree, it is sliced, indexed and reshaped by `jax.tree.map`, like an array.

    Attributes:
      values: int8, of the weight's shape, first of the two (Flax checks it against the model's); or
        the same numbers in the dtype of the computation.
      scale: float32, of size 1 along the axes that products sum over.

    A tree of shapes, specs or shardings has those of the two in their places.
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
    """The nearest int8 weight: off by at most half a scale in each element.

    What is not finite makes its channel's scale, and so every answer, NaN or infinite.

    Args:
      weight: of a floating-point dtype.
      axes: that products sum over.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
    scale = jnp.where(largest < _SMALLEST, 1, largest / _LARGEST)
    values = jnp.clip(jnp.round(weight / scale), -_LARGEST, _LARGEST)
    return Int8(values.astype(jnp.int8), scale)


def widen(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """A weight as a plain array of this dtype."""
    if not isinstance(weight, Int8):
        return weight.astype(dtype)
    return (weight.values.astype(jnp.float32) * weight.scale).astype(dtype)


def cast(weight: Weight, dtype: jnp.dtype) -> Weight:
    """A weight as products in this dtype take it: the integers of an int8 weight, unscaled."""
    if not isinstance(weight, Int8):
        return weight.astype(dtype)
    return dataclasses.replace(weight, values=_numbers(weight.values, dtype))


def _numbers(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """int8 values in another dtype, exactly."""
    return values if values.dtype == dtype else _WIDEN(values, dtype)


def _convert(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return values.astype(dtype)


def _convert_on_cpu(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """bfloat16 from the upper half of float32: XLA's CPU compiler would convert one number after
    the other, ten times slower."""
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
    """`product(equation, x, w)` with the scale on its result, or on x if it is that which has the
    scale's axes (a weight that is used both ways).

    Args:
      equation: of einsum; the axes of w stand in the result, or in x, in their order.
    """
    operands, result = equation.split("->")
    left, right = operands.split(",")
    sizes = dict(zip(right, w.scale.shape, strict=True))
    axes = {name for name, size in sizes.items() if size > 1}

    def scale(names: str) -> jax.Array:
        return w.scale.reshape([sizes.get(name, 1) for name in names])

    values = _numbers(w.values, x.dtype)
    if axes <= set(result):
        return product(equation, x, values) * scale(result)
    return product(equation, (x * scale(left)).astype(x.dtype), values)


def split_like(weight: Weight, spec: PartitionSpec, axes: tuple[int, ...]):
    """The spec of a weight; of an int8 one that of its values and of its scale.

    Args:
      axes: that products sum over, counted from either end.
    """
    return Int8(spec, scale_spec(spec, axes)) if isinstance(weight, Int8) else spec


def scale_spec(spec: PartitionSpec, axes: tuple[int, ...]) -> PartitionSpec:
    """How the scale of a weight of this spec is split: not along the axes summed over."""
    names = list(spec)
    for axis in axes:
        names[axis] = None
    return PartitionSpec(*names)


def int8_sharding(sharding: NamedSharding | None, axes: tuple[int, ...]) -> Int8 | None:
    """Where values and scale of a weight lie that is read onto `sharding`."""
    if sharding is None:
        return None
    return Int8(sharding, NamedSharding(sharding.mesh, scale_spec(sharding.spec, axes)))
