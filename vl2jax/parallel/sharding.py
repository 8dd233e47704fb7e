"""Where parameters live on a mesh: one table, strict about what it does not cover.

The axes of a mesh are explained in `mesh.py`.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vl2jax.common.errors import UserError
from vl2jax.parallel.mesh import AXES, BATCH_AXES, batch_shards

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

# Caches of decoding, axis by axis: n layers, B rows, S slots, H heads.
CACHE_RULES: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    "keys": (None, BATCH_AXES, "tensor", None, None),  # n B H S K
    "values": (None, BATCH_AXES, "tensor", None, None),  # n B H S K
    "latent": (None, BATCH_AXES, None, None),  # n B S C + R
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices, neighbours on it being neighbours in the machine.

    Where the devices form several slices, those of a slice are joined by a fast network and slices
    by a slow one; `data` then goes over the slices, or else `fsdp`.

    Args:
      sizes: devices along each of `AXES`; one may be -1 and takes what is left.
      devices: None: all there are.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, sizes = len(devices), {axis: sizes[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    bad = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1 or count % fixed or (not free and fixed != count):
        raise UserError(
            f"mesh {sizes} does not fit {count} devices: sizes must multiply to {count}, one may"
            f" be -1; for instance {_written(_near(sizes, count))}"
        )
    shape = [count // fixed if size == -1 else size for size in sizes.values()]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    across = next((i for i in (0, 1) if shape[i] % slices == 0), None)
    if slices == 1 or across is None:
        # An axis of 8 on a torus of 4x4x4 takes one of its axes and half of another.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    between = [slices if i == across else 1 for i in range(len(shape))]
    within = [size // parts for size, parts in zip(shape, between, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices)
    return Mesh(grid, AXES, axis_types=types)


def _near(sizes: Mapping[str, int], count: int, divides: Mapping[str, int] | None = None):
    """A mesh like `sizes` that has `count` devices; `data` takes what is left.

    Args:
      divides: of some axes a number that they must divide.
    """
    found, left = dict.fromkeys(AXES, 1), count
    for axis in ("tensor", "expert", "fsdp"):
        wanted = count if sizes[axis] == -1 else max(sizes[axis], 1)
        allowed = math.gcd(left, (divides or {}).get(axis, left))
        found[axis] = max(n for n in range(1, allowed + 1) if not allowed % n and n <= wanted)
        left //= found[axis]
    return found | {"data": left}


def mesh_to_text(mesh: Mesh) -> str:
    """A mesh as `--mesh` takes it, without axes of one device."""
    return _written(dict(mesh.shape))


def _written(sizes: Mapping[str, int]) -> str:
    """Sizes as they are given on a command line, without ones."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


def parse_mesh(text: str) -> tuple[dict[str, int], int]:
    """Sizes of the axes that `--mesh` names, and what they multiply to, a -1 left out.

    Raises:
      UserError: an unknown axis, or no number.
    """
    sizes = {}
    for part in text.split(",") if text else ():
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or not size.removeprefix("-").isdecimal():
            raise UserError(
                f"--mesh {text!r}: {part.strip()!r} is not AXIS=DEVICES with an axis of"
                f" {', '.join(AXES)}; for instance expert={jax.device_count()}"
            )
        sizes[axis] = int(size)
    return sizes, math.prod(size for size in sizes.values() if size != -1)


def read_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh that `--mesh` asks for: "expert=4,tensor=2"; None for "".

    Axes that are left out are 1, but `data` takes the devices that are left.

    Args:
      text: the flag.
      devices: None: all there are.

    Raises:
      UserError: an unknown axis, no number, or sizes that do not fit the devices.
    """
    if not text:
        return None
    sizes, _ = parse_mesh(text)
    data = 1 if -1 in sizes.values() else -1
    return make_mesh({"data": data, "fsdp": 1, "expert": 1, "tensor": 1} | sizes, devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every field of a batch with microbatches: [microbatches, rows or tiles, ...]."""
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
        sizes = _sizes(mesh)
        working = _written(_near(sizes, mesh.size, _common_divisors(abstract)))
        shown = "; ".join(problems[:2]) + (f"; and {len(problems) - 2} more" * (len(problems) > 2))
        raise UserError(
            f"mesh {_written(sizes)} does not divide the model: {shown};"
            f" for instance {working} does"
        )
    return tree


def _sizes(mesh: Mesh) -> dict[str, int]:
    """The size of every axis; 1 where the mesh has none."""
    return {axis: mesh.shape.get(axis, 1) for axis in AXES}


def _common_divisors(abstract) -> dict[str, int]:
    """For each axis the greatest number that divides all sizes it is to split."""
    found = dict.fromkeys(AXES, 0)
    for path, leaf in jax.tree.leaves_with_path(abstract):
        spec = param_spec(jax.tree_util.keystr(path, simple=True, separator="/"))
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None:
                found[axis] = math.gcd(found[axis], size)
    return {axis: size for axis, size in found.items() if size}


def check_batch(mesh: Mesh, *, rows: int, tiles: int, microbatches: int) -> None:
    """Refuses a batch that the parts of the mesh cannot share.

    Raises:
      UserError: rows or tiles do not divide.
    """
    shards = batch_shards(mesh)
    for name, size in (("rows", rows), ("tiles", tiles)):
        parts = microbatches * shards
        if size % parts:
            sizes = _sizes(mesh)
            fits = math.gcd(size // microbatches, mesh.size) if name == "rows" else 0
            other = f", or a mesh like data={fits},tensor={mesh.size // fits}" if fits else ""
            raise UserError(
                f"batch.{name} {size} cannot be shared by mesh {_written(sizes)}, which splits each"
                f" of {microbatches} microbatches into {shards} parts: it must be a multiple of"
                f" {parts}, for instance {-(-size // parts) * parts}{other}"
            )
