"""Where parameters live on a mesh: one table, strict about what it does not cover.

Mesh axes: `data` (copies), `fsdp` (every large parameter split), `expert` (experts placed),
`tensor` (heads, ffn width, vocabulary). A mesh may leave axes out.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vl2jax.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # the axes that rows and tiles are split over

_RUN = r"decoder/(dense|moe)_\d+/"

# (path, spec), the first match wins; layer stacks have a leading axis that is never split.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"image_newline|view_seperator", (None,)),  # D
    (r"vision/patch_embed/kernel", (None, None, None, "tensor")),  # p q 3 W
    (r"vision/patch_embed/bias", ("tensor",)),  # W
    (r"vision/pos_embed", (None, "tensor")),  # P W
    (r"vision/blocks/attn/qkv/kernel", (None, "fsdp", None, "tensor", None)),  # L W 3 H K
    (r"vision/blocks/attn/qkv/bias", (None, None, "tensor", None)),  # L 3 H K
    (r"vision/blocks/attn/proj/kernel", (None, "tensor", None, "fsdp")),  # L H K W
    (r"vision/blocks/mlp/fc1/kernel", (None, "fsdp", "tensor")),  # L W F
    (r"vision/blocks/mlp/fc1/bias", (None, "tensor")),  # L F
    (r"vision/blocks/mlp/fc2/kernel", (None, "tensor", "fsdp")),  # L F W
    (r"vision/blocks/(norm[12]/(scale|bias)|attn/proj/bias|mlp/fc2/bias)", (None, None)),  # L W
    (r"vision/norm/(scale|bias)", (None,)),  # W
    (r"adaptor/layers_\d+/kernel", ("fsdp", "tensor")),  # in out
    (r"adaptor/layers_\d+/bias", ("tensor",)),  # out
    (r"decoder/embed_tokens/embedding", ("tensor", "fsdp")),  # vocab D
    (r"decoder/lm_head/kernel", ("fsdp", "tensor")),  # D vocab
    (r"decoder/norm/scale", (None,)),  # D
    (_RUN + r"self_attn/[qkv]_proj/kernel", (None, "fsdp", "tensor", None)),  # n D H K
    (_RUN + r"self_attn/[qkv]_proj/bias", (None, "tensor", None)),  # n H K
    (_RUN + r"self_attn/(q_b|kv_b)_proj/kernel", (None, "fsdp", "tensor", None)),  # n C H X
    (_RUN + r"self_attn/(q_a|kv_a)_proj/kernel", (None, "fsdp", None)),  # n D C
    (_RUN + r"self_attn/o_proj/kernel", (None, "tensor", None, "fsdp")),  # n H V D
    (_RUN + r"mlp/experts/(gate|up)_proj", (None, "expert", "fsdp", "tensor")),  # n E D F
    (_RUN + r"mlp/experts/down_proj", (None, "expert", "tensor", "fsdp")),  # n E F D
    (_RUN + r"mlp/(shared_experts/)?(gate|up)_proj/kernel", (None, "fsdp", "tensor")),  # n D F
    (_RUN + r"mlp/(shared_experts/)?down_proj/kernel", (None, "tensor", "fsdp")),  # n F D
    (_RUN + r"mlp/gate/kernel", (None, None, None)),  # n D E
    (_RUN + r"mlp/gate/e_score_correction_bias", (None, None)),  # n E
    (_RUN + r".*(norm|layernorm)/scale", (None, None)),  # n D
    (_RUN + r"self_attn/(q_a|kv_a|o)_proj/bias", (None, None)),  # n D
)


def make_mesh(sizes: Mapping[str, int], chosen: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
      sizes: devices along each of `AXES`; one may be -1 and takes what is left.
      chosen: devices; None: all there are.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count() if chosen is None else len(chosen)
    sizes = {axis: sizes[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    bad = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1 or devices % fixed or (not free and fixed != devices):
        raise UserError(
            f"mesh {sizes} does not fit {devices} devices: sizes must multiply to {devices}, one"
            f" may be -1; for instance data={devices} and 1 for the others"
        )
    shape = tuple(devices // fixed if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, devices=chosen, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every field of a batch with pools: [pools, rows or tiles, ...]."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def optimizer_shardings(mesh: Mesh, opt_state):
    """Shardings of an optimizer's state: whatever is kept per parameter lies where it does.

    Args:
      opt_state: tree whose leaves per parameter are in dicts by path, see `optim`.
    """

    def sharding(path, leaf) -> NamedSharding:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        return NamedSharding(mesh, param_spec(keys[-1]) if keys else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def param_spec(path: str) -> PartitionSpec:
    """Spec of one parameter, `path` as in `PARAM_RULES` or with its collection in front.

    Raises:
      ValueError: no rule covers it.
    """
    inner = re.sub(r"^(params|router)/", "", path)
    for pattern, spec in PARAM_RULES:
        if re.fullmatch(pattern, inner):
            return PartitionSpec(*spec)
    raise ValueError(f"no rule in PARAM_RULES covers parameter {path!r}; add one")


def param_shardings(mesh: Mesh, abstract):
    """Shardings of all parameters.

    Args:
      mesh: with axes among `AXES`.
      abstract: tree of arrays or `jax.ShapeDtypeStruct`, as `abstract_params` gives.

    Returns:
      The same tree with a `NamedSharding` per leaf.

    Raises:
      UserError: an unknown mesh axis, or a size that the mesh does not divide.
    """
    unknown = set(mesh.axis_names) - set(AXES)
    if unknown:
        raise UserError(f"mesh axes {sorted(unknown)} are unknown; expected some of {AXES}")
    problems: list[str] = []

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = [axis if axis in mesh.axis_names else None for axis in param_spec(name)]
        for size, axis in zip(leaf.shape, axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(f"{name} {leaf.shape}: {size} by {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, PartitionSpec(*axes))

    tree = jax.tree_util.tree_map_with_path(sharding, abstract)
    if problems:
        shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise UserError(f"mesh {dict(mesh.shape)} does not divide {len(problems)} sizes: {shown}")
    return tree
