"""Bytes that are read: each chunk once per process, and few more than the shards of a mesh."""

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convert.pieces import LEAST_CHUNK, chunk_shape
from convert.writer import StreamedArray, save_streamed
from vl2jax.checkpoints.model_dir import read_leaf
from vl2jax.checkpoints.param_store import ParamStore, read_parts

PATH = "params/decoder/moe_0/mlp/shared_experts/up_proj/kernel"
SHAPE = (3, 1024, 512)  # layers, D, F


def bytes_read(function) -> int:
    name = "/tensorstore/kvstore/file/bytes_read"

    def count() -> int:
        found = ts.experimental_collect_matching_metrics(name)
        return sum(value["value"] for metric in found for value in metric["values"])

    before = count()
    function()
    return count() - before


def chunk() -> tuple[int, ...]:
    axes = type("Axes", (), {"shape": SHAPE[1:], "split_axis": None, "hf_shape": SHAPE[1:]})
    leaf = type("Leaf", (), {"path": PATH, "shape": SHAPE})
    leaf.entries = [type("Entry", (), {"axes": axes})]
    return chunk_shape(leaf, 4)


@pytest.fixture(scope="module")
def values():
    return np.random.default_rng(0).integers(0, 2**31, SHAPE, np.int32).view(np.float32)


@pytest.fixture(scope="module", params=["converted", "one chunk a layer"])
def stored(request, values, tmp_path_factory):
    shape = chunk() if request.param == "converted" else (1, *SHAPE[1:])

    def slices():
        for layer in range(SHAPE[0]):
            yield (slice(layer, layer + 1),), values[layer : layer + 1]

    directory = tmp_path_factory.mktemp("store") / "params"
    save_streamed(directory, {PATH: StreamedArray(SHAPE, values.dtype, shape, slices)})
    return request.param, lambda: ParamStore(directory).open(PATH)


def test_chunks_of_conversions_follow_the_mesh():
    assert chunk() == (1, 64, 512)
    assert np.prod(chunk()) * 4 >= LEAST_CHUNK


@pytest.mark.parametrize("spec", [(None, "x", None), (None, None, "x"), (None, "x", "y")])
def test_each_chunk_is_read_once_by_a_process(spec, stored, values):
    """Eight devices of one process."""
    sizes = (2, 4) if "y" in spec else (8, 1)
    mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding, found = NamedSharding(mesh, PartitionSpec(*spec)), []
    opened = stored[1]()
    count = bytes_read(lambda: found.append(read_leaf(opened, sharding=sharding)))
    np.testing.assert_array_equal(np.asarray(found[0]).view(np.int32), values.view(np.int32))
    assert count <= 1.1 * values.nbytes


def test_processes_read_each_byte_about_once(stored, values):
    """Eight processes of one device each, simulated, with fsdp=8."""
    name, opening = stored
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    total = 0
    for index in sharding.devices_indices_map(SHAPE).values():
        opened = opening()
        total += bytes_read(lambda: read_parts(opened, [index]))  # noqa: B023
    if name == "converted":
        assert total <= 1.1 * values.nbytes
    else:  # as conversions of earlier versions are: every process needs every chunk
        assert total >= 7 * values.nbytes


def test_parts_of_any_kind(stored, values):
    parts = [
        (slice(0, 3), slice(5, 900), slice(3, 4)),
        (slice(1, 2), slice(0, 1024), slice(0, 512)),
        (slice(2, 2), slice(0, 4), slice(0, 4)),
    ]
    for found, part in zip(read_parts(stored[1](), parts), parts, strict=True):
        np.testing.assert_array_equal(found.view(np.int32), values.view(np.int32)[part])
