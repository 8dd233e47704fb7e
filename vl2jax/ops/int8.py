"""int8 weights for inference: symmetric, one scale per output channel, widened where they are used.

Quantised are the kernels of linear maps in decoder and vision tower, the experts and the output
head, 95 to 98% of a released model.  Kept as they are:

- the router, for a small change of a score can choose another expert;
- norms, biases, the adaptor, the patch and position embeddings and the two learned rows, which are
  small and stand in front of everything;
- the token embedding: a step reads the rows of its tokens only, so nothing would get faster, and
  its error would enter the first layer unaveraged, where that of a product is a sum over inputs.

A scale belongs to what a product does not sum over, so the product is multiplied and not the
weight: `x (q * s) = (x q) * s`, and q, at most 127, is exact in bfloat16.
"""

import functools
import math
import re

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.common.errors import UserError
from vl2jax.ops.platform import on_cpu

KINDS = ("int8",)
_LARGEST = 127  # -128 is not used: the range is symmetric
_SMALLEST = 1e-30  # channels that are smaller throughout become 0

_RUN = r"decoder/(dense|moe)_\d+/"

# (path, axes that products sum over); the first match wins, others are not quantised.
SUMMED_AXES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"vision/blocks/attn/qkv/kernel", (1,)),  # L W 3 H K
    (r"vision/blocks/attn/proj/kernel", (1, 2)),  # L H K W
    (r"vision/blocks/mlp/fc[12]/kernel", (1,)),  # L W F, L F W
    (r"decoder/lm_head/kernel", (0,)),  # D vocab
    (_RUN + r"self_attn/o_proj/kernel", (1, 2)),  # n H V D
    (_RUN + r"self_attn/(q|k|v|q_a|q_b|kv_a|kv_b)_proj/kernel", (1,)),  # n D H K, n D C, n C H X
    (_RUN + r"mlp/experts/(gate|up|down)_proj", (2,)),  # n E D F, n E F D
    (_RUN + r"mlp/(shared_experts/)?(gate|up|down)_proj/kernel", (1,)),  # n D F, n F D
)


@flax.struct.dataclass
class Int8:
    """A weight `values * scale`, in the place of an array in the tree of parameters.

    Being a pytree, it is sliced, indexed and reshaped by `jax.tree.map`, like an array.

    Attributes:
      values: int8, of the weight's shape, first of the two (Flax checks it against the model's); or
        the same numbers in the dtype of the computation.
      scale: float32, of size 1 along the axes that products sum over.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return math.prod(self.values.shape)


Weight = jax.Array | Int8


def check_kind(kind: str | None) -> None:
    """Raises UserError for a kind of quantisation that there is not; None is none."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"quantize must be one of {', '.join(KINDS)}, or None; got {kind!r}")


def summed_axes(path: str) -> tuple[int, ...] | None:
    """The axes of a parameter that its products sum over; None: it is not quantised.

    Args:
      path: "params/decoder/...", or without its collection.
    """
    inner = re.sub(r"^(params|router)/", "", path)
    return next((axes for pattern, axes in SUMMED_AXES if re.fullmatch(pattern, inner)), None)


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


def quantize_tree(params: dict) -> dict:
    """All variables of a model at once, for those that are in memory already; see `quantize`.

    Also of shapes, inside `jax.eval_shape`.
    """

    def one(path, leaf):
        axes = summed_axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if axes is None else quantize(leaf, axes)

    return jax.tree_util.tree_map_with_path(one, params)


def widen(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """A weight as a plain array of this dtype."""
    if not isinstance(weight, Int8):
        return weight.astype(dtype)
    return (weight.values.astype(jnp.float32) * weight.scale).astype(dtype)


def cast(weight: Weight, dtype: jnp.dtype) -> Weight:
    """A weight as products in this dtype take it: the integers of an int8 weight, unscaled."""
    if not isinstance(weight, Int8):
        return weight.astype(dtype)
    return weight.replace(values=_numbers(weight.values, dtype))


def _numbers(values: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """int8 values in another dtype, exactly.

    On CPU bfloat16 comes from the upper half of float32: XLA's compiler would convert one number
    after the other, ten times slower.
    """
    if values.dtype == dtype or dtype != jnp.bfloat16 or not on_cpu():
        return values.astype(dtype)
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), dtype)


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


def int8_shapes(params):
    """Shapes of a tree, as `abstract_params` gives them but with shardings, quantised."""

    def one(path, leaf: jax.ShapeDtypeStruct):
        axes = summed_axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        if axes is None:
            return leaf
        where, shapes = int8_sharding(leaf.sharding, axes), jax.eval_shape(quantizer(axes), leaf)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            *(shapes, where),
        )

    return jax.tree_util.tree_map_with_path(one, params)


@functools.cache
def quantizer(axes: tuple[int, ...], sharding: NamedSharding | None = None):
    """`quantize`, compiled: each device quantises its part."""
    return jax.jit(
        functools.partial(quantize, axes=axes), out_shardings=int8_sharding(sharding, axes)
    )


@functools.cache
def layer_quantizer(axes: tuple[int, ...], sharding: NamedSharding | None):
    """Two compiled functions that fill a stack: (shape [n, ...]) -> zeros; (stack (donated), one
    layer [1, ...], its number) -> the stack with this layer quantised."""
    shardings = int8_sharding(sharding, axes)

    def empty(shape: tuple[int, ...]) -> Int8:
        scale = [1 if i in axes else size for i, size in enumerate(shape)]
        return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(scale, jnp.float32))

    def put(stack: Int8, layer: jax.Array, number: jax.Array) -> Int8:
        def into(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, number, axis=0)

        return jax.tree.map(into, stack, quantize(layer, axes))

    empty = jax.jit(empty, static_argnums=0, out_shardings=shardings)
    return empty, jax.jit(put, donate_argnums=0, out_shardings=shardings)
