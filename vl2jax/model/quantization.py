"""Which weights are quantised to int8 for inference, and how.

The kernels of linear layers in decoder and vision tower, the experts and the output head are
quantised: 95 to 98% of a released model.  The other parameters keep their dtype:

- the router, because a small change of a score can choose another expert;
- norms, biases, the adaptor, the patch and position embeddings, `image_newline` and
  `view_seperator`, which are small and whose errors would affect everything after them;
- the token embedding.  A step reads only the rows of its tokens, so int8 would save no time.  Its
  rounding error would enter the first layer directly, while the errors of a product average out in
  its sum over inputs.

Axis legend: L blocks of the vision tower, n layers of a run, W vision width, D width, F ffn width,
H heads, K head width, V v_head_dim, C kv_lora_rank, E experts, X key and value width.
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

# (regex of the path, axes that matrix products sum over).  The first match wins; parameters without
# a match are not quantised.
CONTRACTED_AXES: tuple[tuple[str, tuple[int, ...]], ...] = (
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
    """Checks the option `quantize`; None means no quantisation.

    Raises:
      UserError: the kind is unknown.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"quantize must be one of {', '.join(KINDS)}, or None; got {kind!r}")


def contracted_axes(path: str) -> tuple[int, ...] | None:
    """The axes of a parameter that matrix products sum over, or None if it is not quantised.

    Args:
      path: "params/decoder/...", or without the name of the collection.
    """
    inner = re.sub(r"^(params|router)/", "", path)
    return next((axes for pattern, axes in CONTRACTED_AXES if re.fullmatch(pattern, inner)), None)


def quantize_tree(params: dict) -> dict:
    """Quantises all variables of a model that are in memory; see `quantize`.

    Works inside `jax.jit` and `jax.eval_shape`.
    """

    def quantize_leaf(path, leaf):
        axes = contracted_axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        return leaf if axes is None else quantize(leaf, axes)

    return jax.tree_util.tree_map_with_path(quantize_leaf, params)


def int8_shapes(params):
    """Shapes and shardings of a model after quantisation.

    Args:
      params: a tree of `jax.ShapeDtypeStruct` like that of `abstract_params`, with shardings.

    Returns:
      The tree, with an `Int8` of two `jax.ShapeDtypeStruct` for each quantised weight.
    """

    def quantize_leaf(path, leaf: jax.ShapeDtypeStruct):
        axes = contracted_axes(jax.tree_util.keystr(path, simple=True, separator="/"))
        if axes is None:
            return leaf
        shardings, shapes = (
            int8_sharding(leaf.sharding, axes),
            jax.eval_shape(quantizer(axes), leaf),
        )
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            *(shapes, shardings),
        )

    return jax.tree_util.tree_map_with_path(quantize_leaf, params)


@functools.cache
def quantizer(axes: tuple[int, ...], sharding: NamedSharding | None = None):
    """`quantize`, compiled so that each device quantises its shard."""
    return jax.jit(
        functools.partial(quantize, axes=axes), out_shardings=int8_sharding(sharding, axes)
    )


@functools.cache
def layer_quantizer(axes: tuple[int, ...], sharding: NamedSharding | None):
    """Compiled functions that quantise a stack of layers one layer at a time.

    Args:
      axes: axes that matrix products sum over.
      sharding: of the stack; None: the default device.

    Returns:
      A function from a shape [n, ...] to an `Int8` of zeros, and a function from such a stack
      (donated), a layer [1, ...] and its index to the stack with that layer quantised.
    """
    shardings = int8_sharding(sharding, axes)

    def empty(shape: tuple[int, ...]) -> Int8:
        scale = [1 if i in axes else size for i, size in enumerate(shape)]
        return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros(scale, jnp.float32))

    def put(stack: Int8, layer: jax.Array, index: jax.Array) -> Int8:
        def update(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=0)

        return jax.tree.map(update, stack, quantize(layer, axes))

    empty = jax.jit(empty, static_argnums=0, out_shardings=shardings)
    return empty, jax.jit(put, donate_argnums=0, out_shardings=shardings)
