"""Which weights are quantised for inference, and how a model's variables become so.

Quantised are the kernels of linear maps in decoder and vision tower, the experts and the output
head, 95 to 98% of a released model.  Kept as they are:

- the router, for a small change of a score can choose another expert;
- norms, biases, the adaptor, the patch and position embeddings and the two learned rows, which are
  small and stand in front of everything;
- the token embedding: a step reads the rows of its tokens only, so nothing would get faster, and
  its error would enter the first layer unaveraged, where that of a product is a sum over inputs.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vl2jax.common.errors import UserError
from vl2jax.ops.matmul.int8 import Int8, int8_sharding, quantize

KINDS = ("int8",)

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


def quantize_tree(params: dict) -> dict:
    """All variables of a model at once, for those that are in memory already; see `quantize`.

    Also of shapes, inside `jax.eval_shape`.
    """

    def one(path, leaf):
        axes = summed_axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if axes is None else quantize(leaf, axes)

    return jax.tree_util.tree_map_with_path(one, params)


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
