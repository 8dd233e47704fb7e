"""Tests of the sharding rules, of errors about meshes, and of a model loaded onto a mesh."""

import dataclasses
import json
import math
import re

import jax
import mesh_case
import numpy as np
import pytest
from golden import padded_batch

import vl2jax
from vl2jax.common.errors import UserError
from vl2jax.config import architecture as configs
from vl2jax.model.vl2 import abstract_params
from vl2jax.parallel.mesh import batch_shards
from vl2jax.parallel.sharding import (
    AXES,
    PARAM_RULES,
    check_batch,
    make_mesh,
    optimizer_shardings,
    param_shardings,
    param_spec,
    read_mesh,
)
from vl2jax.training.optim import OptimConfig, make_optimizer
from vl2jax.training.setup import jit_train_step, state_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _mesh(**axes):
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def _paths(config):
    return _flat(abstract_params(config))


def _flat(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.fixture(scope="module")
def all_paths(data_dir):
    extra = json.loads((data_dir / "mini-extra" / "config.json").read_text())
    tiny = configs.tiny()
    biased = dataclasses.replace(tiny.decoder, attention_bias=True)
    found = [configs.VL2Config.from_hf(extra), dataclasses.replace(tiny, decoder=biased)]
    found += [preset() for preset in configs.PRESETS.values()]
    return [_paths(config) for config in found]


def test_every_parameter_has_a_rule_of_its_rank(all_paths):
    for paths in all_paths:
        for path, leaf in paths.items():
            assert len(param_spec(path)) == leaf.ndim, path


def test_every_rule_is_the_first_match_of_some_parameter(all_paths):
    names = {path.split("/", 1)[1] for paths in all_paths for path in paths}
    first = {next(rule for rule, _ in PARAM_RULES if re.fullmatch(rule, name)) for name in names}
    assert first == {rule for rule, _ in PARAM_RULES}


def test_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match="decoder/surprise"):
        param_spec("params/decoder/surprise")


def test_released_sizes_divide_by_usual_meshes():
    mesh = _mesh(fsdp=2, expert=2, tensor=2)
    for preset in configs.PRESETS.values():
        param_shardings(mesh, abstract_params(preset()))


def test_what_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"experts/.*expert=5"):
        param_shardings(_mesh(expert=5), abstract_params(configs.base()))
    with pytest.raises(UserError, match="model"):
        param_shardings(_mesh(model=2), abstract_params(configs.base()))


def test_loaded_onto_a_mesh(mini, tmp_path):
    """Experts are sharded over `expert`, each device has its part, and logits are unchanged."""
    from convert import to_jax

    whole = mini("mini-small", "one_image")
    to_jax.convert(whole.source, tmp_path / "model")
    mesh = _mesh(data=2, fsdp=2, expert=2)
    model = vl2jax.load(tmp_path / "model", mesh=mesh)
    gate = model.params["params"]["decoder"]["moe_1"]["mlp"]["experts"]["gate_proj"]
    assert gate.sharding.spec == jax.sharding.PartitionSpec(None, "expert", "fsdp", None)
    shard = gate.addressable_shards[0].data.shape
    assert shard == (gate.shape[0], gate.shape[1] // 2, gate.shape[2] // 2, gate.shape[3])
    jax.tree.map(np.testing.assert_array_equal, model.params, whole.params)
    batch = padded_batch(whole.config, whole.arrays("one_image"))
    logits = vl2jax.forward(model.config, model.params, batch)
    want = vl2jax.forward(whole.config, whole.params, batch)
    np.testing.assert_allclose(logits, want, atol=1e-4)


def test_make_mesh():
    mesh = make_mesh({"data": -1, "fsdp": 2, "expert": 2, "tensor": 1})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert make_mesh({"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}).size == 8
    for wrong in ((3, 1, 1, 1), (-1, 3, 1, 1), (-1, -1, 1, 1), (0, 1, 1, 1), (4, 1, 1, 1)):
        with pytest.raises(UserError, match="does not fit 8 devices: sizes must multiply to 8"):
            make_mesh(dict(zip(AXES, wrong, strict=True)))


@pytest.mark.parametrize(
    ("text", "want"),
    [("expert=4,tensor=2", (1, 1, 4, 2)), ("fsdp=2", (4, 2, 1, 1)), ("fsdp=-1", (1, 8, 1, 1))],
)
def test_mesh_of_a_flag(text, want):
    assert tuple(read_mesh(text).shape.values()) == want
    assert read_mesh("") is None


def test_mistakes_name_numbers_and_what_works():
    """Each message is one line, and proposes a mesh or batch that works."""
    base = abstract_params(configs.base())
    for refused, message in (
        (lambda: read_mesh("expert=3"), "does not fit 8 devices.*for instance data=4,expert=2"),
        (lambda: read_mesh("expert=4,tensor=4"), "for instance expert=2,tensor=4"),
        (lambda: read_mesh("experts=4"), "'experts=4' is not AXIS=DEVICES with an axis of data,"),
        (lambda: read_mesh("expert=four"), "is not AXIS=DEVICES"),
        (
            lambda: param_shardings(_mesh(expert=5), base),
            r"mesh expert=5 does not divide the model: .*experts/.*: 72 by expert=5",
        ),
        (
            lambda: param_shardings(_mesh(data=1, expert=7), base),
            "72 by expert=7; .* more; for instance data=7 does",
        ),
        (
            lambda: check_batch(_mesh(data=2, expert=4), rows=12, tiles=64, microbatches=1),
            r"batch\.rows 12 cannot be split by mesh data=2,expert=4, .* into 8 parts: it must be"
            " a multiple of 8, for instance 16, or a mesh like data=4,tensor=2",
        ),
        (
            lambda: check_batch(_mesh(fsdp=4), rows=8, tiles=20, microbatches=2),
            r"batch\.tiles 20 .* each of 2 microbatches into 4 parts: .* for instance 24",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (1, 2, 4, 1), (1, 2, 2, 2)])
def test_each_device_has_its_part(sizes):
    """Parameters of base on a device: the total divided by the number of shards, within 2%."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    abstract = abstract_params(configs.base())
    experts = {path: leaf for path, leaf in _flat(abstract).items() if "/experts/" in path}
    rest = {path: leaf for path, leaf in _flat(abstract).items() if path not in experts}
    placed = _flat(param_shardings(mesh, abstract))
    want = sum(leaf.size for leaf in experts.values()) / mesh.size
    want += sum(leaf.size for leaf in rest.values()) / (mesh.size // mesh.shape["expert"])
    parts = {path: placed[path].shard_shape(leaf.shape) for path, leaf in _flat(abstract).items()}
    assert sum(math.prod(shape) for shape in parts.values()) == pytest.approx(want, rel=0.02)
    for path, leaf in experts.items():
        assert math.prod(parts[path]) * mesh.size == leaf.size


def test_optimizer_state_lies_with_its_parameters(all_paths):
    """Both moments of each parameter are sharded like the parameter."""
    mesh = make_mesh({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})
    flat = {path.removeprefix("params/"): leaf for path, leaf in all_paths[-1].items()}
    flat = {path: leaf for path, leaf in flat.items() if not path.startswith("router/")}
    optimizer = make_optimizer(OptimConfig(lr=1.0), 10)
    state = jax.eval_shape(optimizer.init, flat)
    placed = jax.tree.leaves_with_path(optimizer_shardings(mesh, state))
    seen = {}
    for path, sharding in placed:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if keys:
            assert sharding.spec == param_spec(keys[0])
            seen[keys[0]] = seen.get(keys[0], 0) + 1
        else:
            assert sharding.spec == jax.sharding.PartitionSpec()
    assert seen == dict.fromkeys(flat, 2)  # two moments each


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A device of a TPU that is not there, as `mesh_utils` reads it."""

    id: int
    slice_index: int
    coords: tuple[int, ...]
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0
    num_cores: int = 1
    client: None = None


def _pod(kind: str, slices: int, *shape: int) -> list[_Chip]:
    """The devices of several slices."""
    places = [(s, tuple(map(int, place))) for s in range(slices) for place in np.ndindex(*shape)]
    return [
        _Chip(i, s, (*place, 0, 0)[:3], kind, process_index=i // 4)
        for i, (s, place) in enumerate(places)
    ]


@pytest.mark.parametrize(
    ("kind", "slices", "shape", "sizes"),
    [
        ("TPU v5p", 1, (4, 4, 4), dict(fsdp=8, expert=8)),
        ("TPU v5p", 2, (4, 4, 4), dict(data=2, fsdp=8, expert=8)),
        ("TPU v5p", 2, (4, 4, 4), dict(fsdp=16, expert=8)),
        ("TPU v5p", 3, (4, 4, 4), dict(data=3, fsdp=8, expert=8)),
        ("TPU v5p", 3, (4, 4, 4), dict(fsdp=24, expert=4, tensor=2)),
        ("TPU v5p", 4, (4, 4, 4), dict(data=2, fsdp=16, expert=8)),
        ("TPU v5p", 4, (4, 4, 4), dict(data=8, expert=16, tensor=2)),
        ("TPU v5 lite", 2, (2, 4), dict(data=2, expert=8)),
        ("TPU v5 lite", 3, (4, 4), dict(data=6, expert=8)),
        ("TPU v5 lite", 4, (16, 16), dict(data=4, fsdp=32, tensor=8)),
        ("TPU v6 lite", 2, (8, 8), dict(fsdp=16, expert=8)),
    ],
)
def test_only_data_and_fsdp_go_across_slices(kind, slices, shape, sizes):
    """Every device is in the mesh once, and `data` crosses slices as far as it can."""
    devices = _pod(kind, slices, *shape)
    sizes = dict.fromkeys(AXES, 1) | sizes
    grid = make_mesh(sizes, devices).devices
    assert grid.shape == tuple(sizes.values())
    assert sorted(device.id for device in grid.flat) == list(range(len(devices)))
    where = np.vectorize(lambda device: device.slice_index)(grid)
    assert (where == where[:, :, :1, :1]).all()  # expert and tensor stay in a slice
    of_data = len(set(where[:, 0, 0, 0]))
    assert of_data == math.gcd(sizes["data"], slices)
    assert len(set(where[0, :, 0, 0])) == slices // of_data


def test_gpus_of_several_hosts():
    """Their hosts are slices to JAX; an axis that only fits all of them may cross them."""
    devices = [dataclasses.replace(d, platform="gpu") for d in _pod("NVIDIA H100", 2, 8)]
    grid = make_mesh({"data": 1, "fsdp": 1, "expert": 16, "tensor": 1}, devices).devices
    assert [device.id for device in grid.flat] == list(range(16))


def test_what_does_not_go_across_slices_is_refused():
    for devices, sizes, message in (
        (
            _pod("TPU v5p", 3, 4, 4, 4),
            (1, 8, 24, 1),
            "mesh fsdp=8,expert=24 does not fit 3 slices of 64 devices: only data and fsdp go"
            " across slices, so data x fsdp must be a multiple of 3; for instance"
            " data=3,fsdp=4,expert=16",
        ),
        (
            _pod("TPU v5 lite", 2, 4, 4),
            (1, 1, 8, 4),
            ".* must be a multiple of 2; for instance data=2,expert=4,tensor=4",
        ),
        (
            _pod("TPU v5 lite", 2, 4, 4)[:24],
            (24, 1, 1, 1),
            "the slices must have equally many devices, but they have 8, 16",
        ),
    ):
        with pytest.raises(UserError, match=message) as caught:
            make_mesh(dict(zip(AXES, sizes, strict=True)), devices)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("expert", "tensor")])
def test_a_mesh_may_omit_axes(axes):
    """The train step is traced for it: state, batch, experts and loss find their shardings."""
    mesh = _mesh(**dict(zip(axes, (4, 2) if len(axes) > 1 else (4,), strict=True)))
    recipe = mesh_case.recipe(mesh_case.architecture("mla"), batch_shards(mesh))
    with jax.set_mesh(mesh):
        shapes = state_shapes(recipe, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        step = jit_train_step(recipe, mesh, shardings)
        step.trace(shapes, mesh_case.batches(batch_shards(mesh))[0])
    used = {axis for leaf in jax.tree.leaves(shardings) for axis in leaf.spec if axis}
    assert used == set(axes) - {"data"}
