"""Sharding of parameters, caches, batches and optimizer state; meshes and the `--mesh` flag.

One table gives the sharding of each parameter; a parameter without a rule is an error.  `mesh.py`
explains the mesh axes.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vl2jax.common.errors import UserError
from vl2jax.parallel.mesh import AXES, BATCH_AXES, batch_axes, batch_shards

_RUN = r"decoder/(dense|moe)_\d+/"

# (regex of the path, spec); the first match wins.  Layer stacks have a leading axis, which is never
# sharded.
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"image_newline|view_seperator", (None,)),  # D
    (r"vision/patch_embed/kernel", (None, None, None, None)),  # p q 3 W
    (r"vision/patch_embed/bias", (None,)),  # W
    (r"vision/pos_embed", (None, None)),  # P W
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

# Specs of the KV caches: n layers, B rows, S slots, H heads.
CACHE_RULES: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    "keys": (None, BATCH_AXES, "tensor", None, None),  # n B H S K
    "values": (None, BATCH_AXES, "tensor", None, None),  # n B H S K
    "latent": (None, BATCH_AXES, None, None),  # n B S C + R
}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh in which neighbours are close to each other in the network.

    If the devices are in several slices, which are connected by a slower network, only `data` and
    `fsdp` go across the slices: `data` as far as its size allows it, `fsdp` for the rest.

    Args:
      sizes: number of devices along each of `AXES`; one size may be -1: all remaining devices.
      devices: the devices; None: all.

    Raises:
      UserError: the product of the sizes is not the number of devices, the slices have different
        sizes, or `data` and `fsdp` cannot go across them.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, sizes = len(devices), {axis: sizes[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    bad = [axis for axis, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1 or count % fixed or (not free and fixed != count):
        raise UserError(
            f"mesh {sizes} does not fit {count} devices: sizes must multiply to {count}, one may"
            f" be -1; for instance {_format_sizes(_nearest_sizes(sizes, count))}"
        )
    shape = [count // fixed if size == -1 else size for size in sizes.values()]
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    between = _across_slices(dict(zip(AXES, shape, strict=True)), slices, devices[0].platform)
    within = [size // parts for size, parts in zip(shape, between, strict=True)]
    # On a 4x4x4 torus an axis of size 8 is mapped to one of its axes and half of another.
    split: dict[str, Any] = {"allow_split_physical_axes": True}
    if math.prod(between) == 1:
        grid = mesh_utils.create_device_mesh(within, devices, **split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _across_slices(sizes: dict[str, int], slices: Mapping[int, int], platform: str) -> list[int]:
    """For each of `AXES` the number of parts into which the slices divide it.

    Args:
      sizes: sizes of the axes.
      slices: number of devices in each slice.
      platform: platform of the devices.
    """
    count = len(slices)
    data = math.gcd(sizes["data"], count)
    fsdp = count // data
    if len(set(slices.values())) > 1:
        shown = ", ".join(map(str, sorted(slices.values())[:8]))
        raise UserError(f"the slices must have equally many devices, but they have {shown}")
    if sizes["fsdp"] % fsdp and platform == "gpu":  # its slices are hosts, which any axis may cross
        return [1] * len(AXES)
    if sizes["fsdp"] % fsdp:
        within = max(slices.values())
        works = _nearest_sizes(sizes, within)
        works["data"] *= count
        raise UserError(
            f"mesh {_format_sizes(sizes)} does not fit {count} slices of {within} devices: only"
            f" data and fsdp go across slices, so data x fsdp must be a multiple of {count};"
            f" for instance {_format_sizes(works)}"
        )
    return [{"data": data, "fsdp": fsdp}.get(axis, 1) for axis in AXES]


def _nearest_sizes(sizes: Mapping[str, int], count: int, divides: Mapping[str, int] | None = None):
    """Sizes near `sizes` for `count` devices; an axis divides its number in `divides`, if any."""
    found, left = dict.fromkeys(AXES, 1), count
    for axis in ("tensor", "expert", "fsdp"):
        wanted = count if sizes[axis] == -1 else max(sizes[axis], 1)
        allowed = math.gcd(left, (divides or {}).get(axis, left))
        found[axis] = max(n for n in range(1, allowed + 1) if not allowed % n and n <= wanted)
        left //= found[axis]
    return found | {"data": left}


def mesh_to_text(mesh: Mesh) -> str:
    """Formats a mesh for `--mesh`, without axes of size 1."""
    return _format_sizes(dict(mesh.shape))


def _format_sizes(sizes: Mapping[str, int]) -> str:
    """Formats sizes for `--mesh`, without axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


def parse_mesh(text: str) -> tuple[dict[str, int], int]:
    """Parses the flag `--mesh`.

    Args:
      text: the flag, such as "expert=4,tensor=2".

    Returns:
      The sizes of the given axes, and their product without -1.

    Raises:
      UserError: an axis is unknown, or a size is not a number.
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
    """Makes the mesh of the flag `--mesh`, such as "expert=4,tensor=2".

    Axes that are not given have size 1, except `data`, which takes the remaining devices.

    Args:
      text: the flag.
      devices: the devices; None: all.

    Returns:
      The mesh; None for "".

    Raises:
      UserError: an axis is unknown, a size is not a number, or the sizes do not fit the devices.
    """
    if not text:
        return None
    sizes, _ = parse_mesh(text)
    data = 1 if -1 in sizes.values() else -1
    return make_mesh({"data": data, "fsdp": 1, "expert": 1, "tensor": 1} | sizes, devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of every field of a batch, [microbatches, rows or tiles, ...]."""
    return NamedSharding(mesh, PartitionSpec(None, batch_axes(mesh)))


def optimizer_shardings(mesh: Mesh, opt_state):
    """Returns the shardings of an optimizer state.

    Args:
      mesh: the mesh.
      opt_state: tree of arrays or shapes, with state per parameter in dicts by path, see
        `training/optim.py`.

    Returns:
      The same tree of `NamedSharding`s.  State of a parameter is sharded like the parameter; other
      state is replicated.
    """

    def sharding(path, leaf) -> NamedSharding:
        keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        return NamedSharding(mesh, _present(mesh, param_spec(keys[-1]) if keys else ()))

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def param_spec(path: str) -> PartitionSpec:
    """Returns the partition spec of a parameter.

    Args:
      path: its path, as in `PARAM_RULES` or with its collection ("params/", "router/") in front.

    Raises:
      ValueError: no rule matches.
    """
    inner = re.sub(r"^(params|router)/", "", path)
    for pattern, spec in PARAM_RULES:
        if re.fullmatch(pattern, inner):
            return PartitionSpec(*spec)
    raise ValueError(f"no rule in PARAM_RULES covers parameter {path!r}; add one")


def param_shardings(mesh: Mesh, abstract):
    """Returns the shardings of all parameters.

    Args:
      mesh: mesh with axes of `AXES`.
      abstract: tree of arrays or `jax.ShapeDtypeStruct`s, as `abstract_params` returns it.

    Returns:
      The same tree of `NamedSharding`s.

    Raises:
      UserError: a mesh axis is unknown, or a mesh axis does not divide the size it shards.
    """
    unknown = set(mesh.axis_names) - set(AXES)
    if unknown:
        raise UserError(f"mesh axes {sorted(unknown)} are unknown; expected some of {AXES}")
    problems: list[str] = []

    def sharding(path, leaf) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = _present(mesh, param_spec(name))
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(f"{name} {leaf.shape}: {size} by {axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    tree = jax.tree_util.tree_map_with_path(sharding, abstract)
    if problems:
        sizes = _sizes(mesh)
        working = _format_sizes(_nearest_sizes(sizes, mesh.size, _common_divisors(abstract)))
        shown = "; ".join(problems[:2]) + (f"; and {len(problems) - 2} more" * (len(problems) > 2))
        raise UserError(
            f"mesh {_format_sizes(sizes)} does not divide the model: {shown};"
            f" for instance {working} does"
        )
    return tree


def _present(mesh: Mesh, spec: Iterable[Any]) -> PartitionSpec:
    """A spec without the axes that the mesh omits."""
    return PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in spec))


def _sizes(mesh: Mesh) -> dict[str, int]:
    """Size of each of `AXES`; 1 if the mesh omits it."""
    return {axis: mesh.shape.get(axis, 1) for axis in AXES}


def _common_divisors(abstract) -> dict[str, int]:
    """For each mesh axis the greatest common divisor of the sizes it shards."""
    found = dict.fromkeys(AXES, 0)
    for path, leaf in jax.tree.leaves_with_path(abstract):
        spec = param_spec(jax.tree_util.keystr(path, simple=True, separator="/"))
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None:
                found[axis] = math.gcd(found[axis], size)
    return {axis: size for axis, size in found.items() if size}


def check_batch(mesh: Mesh, *, rows: int, tiles: int, microbatches: int) -> None:
    """Checks that a mesh can shard a batch.

    Args:
      mesh: the mesh.
      rows: rows of the batch.
      tiles: tile slots of the batch.
      microbatches: number of microbatches.

    Raises:
      UserError: rows or tiles are not a multiple of microbatches x parts.
    """
    shards = batch_shards(mesh)
    for name, size in (("rows", rows), ("tiles", tiles)):
        parts = microbatches * shards
        if size % parts:
            sizes = _sizes(mesh)
            fits = math.gcd(size // microbatches, mesh.size) if name == "rows" else 0
            other = f", or a mesh like data={fits},tensor={mesh.size // fits}" if fits else ""
            raise UserError(
                f"batch.{name} {size} cannot be split by mesh {_format_sizes(sizes)}, which splits"
                f" each of {microbatches} microbatches into {shards} parts: it must be a multiple"
                f" of {parts}, for instance {-(-size // parts) * parts}{other}"
            )
