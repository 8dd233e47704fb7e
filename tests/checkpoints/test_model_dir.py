"""The model directory: model.json, and loading parameters."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vl2jax.checkpoints.model_dir import (
    CheckpointError,
    ModelDir,
    flat_shapes,
    load_params,
    read_model_dir,
    write_model_json,
)
from vl2jax.checkpoints.param_store import ParamStore, read_array
from vl2jax.config import architecture as presets

TREE = {
    "params": {
        "decoder": {
            "norm": {"scale": np.arange(6, dtype=np.float32) / 7},
            "moe_1": {"experts": np.arange(48).reshape(2, 4, 6).astype(ml_dtypes.bfloat16)},
        },
        "image_newline": np.full((6,), 1.5, ml_dtypes.bfloat16),
    },
    "router": {"decoder": {"moe_1": {"bias": np.float32([[0.1], [0.2]])}}},
}
SHAPES = {
    "params/decoder/moe_1/experts": (2, 4, 6),
    "params/decoder/norm/scale": (6,),
    "params/image_newline": (6,),
    "router/decoder/moe_1/bias": (2, 1),
}


@pytest.fixture(scope="module")
def params(tmp_path_factory) -> Path:
    """Parameters that Orbax writes with its default settings."""
    import orbax.checkpoint as ocp

    directory = tmp_path_factory.mktemp("checkpoint") / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, jax.tree.map(jnp.asarray, TREE))
    return directory


@pytest.fixture
def model_dir(tmp_path) -> Path:
    path = tmp_path / "model"
    (path / "params").mkdir(parents=True)
    (path / "tokenizer.json").touch()
    (path / "processor_config.json").touch()
    write_model_json(
        ModelDir(
            path=path,
            config=presets.base(),
            dtype="bfloat16",
            source_dtype="bfloat16",
            source_dtypes={"a.bias": "float32"},
            dropped=[{"tensors": ["b"], "reason": "unused"}],
        )
    )
    return path


def test_model_json_says_what_was_written(model_dir):
    model = read_model_dir(str(model_dir))
    assert model.config == presets.base()
    assert (model.dtype, model.source_dtype) == ("bfloat16", "bfloat16")
    assert model.source_dtypes == {"a.bias": "float32"}
    assert model.dropped == [{"tensors": ["b"], "reason": "unused"}]
    assert model.params == model_dir / "params"
    content = json.loads((model_dir / "model.json").read_text())
    assert (content["format"], content["format_version"]) == ("vl2jax", 1)
    assert content["config"]["language_config"]["n_routed_experts"] == 72


def test_directories_that_are_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone does not exist; expected the output of"):
        read_model_dir(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is a file, not a directory"):
        read_model_dir(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(CheckpointError, match=r"no model\.json among its 1 entries \['cat\.png'\]"):
        read_model_dir(tmp_path / "photos")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"convert it first: python -m convert\.to_jax .*hf"):
        read_model_dir(tmp_path / "hf")
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"left by an interrupted conversion"):
        read_model_dir(tmp_path / "out.partial")


def test_incomplete_models(model_dir):
    (model_dir / "tokenizer.json").unlink()
    shutil.rmtree(model_dir / "params")
    with pytest.raises(CheckpointError, match=r"incomplete: tokenizer\.json, params/ missing"):
        read_model_dir(model_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, '"format": "vl2jax"'),
        ({"format_version": 2}, "has format_version 2; this program reads 1: update vl2jax"),
        ({"config": {}}, "'language_config' is absent"),
        ({"config": None}, "missing or malformed entry"),
        ({"dtype": ...}, "missing or malformed entry ('dtype')"),
    ],
)
def test_bad_model_json(model_dir, change, message):
    content = json.loads((model_dir / "model.json").read_text()) | change
    content = {key: value for key, value in content.items() if value is not ...}
    (model_dir / "model.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as error:
        read_model_dir(model_dir)
    assert message in str(error.value)


def test_model_json_that_is_not_json(model_dir):
    (model_dir / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model\.json is not JSON"):
        read_model_dir(model_dir)


def test_parameters_come_back_as_stored(params):
    seen = []
    loaded = load_params(params, SHAPES, on_leaf=lambda path, size: seen.append((path, size)))
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(TREE), strict=True):
        assert isinstance(got, jax.Array)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), want)
    assert flat_shapes(loaded) == SHAPES
    assert seen == [
        ("params/decoder/moe_1/experts", 96),
        ("params/decoder/norm/scale", 24),
        ("params/image_newline", 12),
        ("router/decoder/moe_1/bias", 8),
    ]


def test_parameters_are_cast_but_router_state_is_not(params):
    loaded = load_params(params, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded["params"])} == {jnp.dtype("bfloat16")}
    bias = loaded["router"]["decoder"]["moe_1"]["bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(bias), np.float32([[0.1], [0.2]]))
    np.testing.assert_array_equal(
        np.asarray(loaded["params"]["decoder"]["norm"]["scale"]),
        (np.arange(6, dtype=np.float32) / 7).astype(ml_dtypes.bfloat16),
    )


def test_collections_are_there_without_router_state(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "p", {"params": {"x": jnp.ones(2)}, "router": {}})
    loaded = load_params(tmp_path / "p", {"params/x": (2,)})
    assert loaded["router"] == {}
    assert loaded["params"]["x"].tolist() == [1.0, 1.0]


def test_all_differences_from_the_model_in_one_report(params):
    wanted = dict(SHAPES)
    del wanted["params/image_newline"]
    wanted["params/view_seperator"] = (6,)
    wanted["params/decoder/norm/scale"] = (7,)
    with pytest.raises(CheckpointError) as error:
        load_params(params, wanted)
    assert str(error.value).splitlines()[1:] == [
        "  - missing: params/view_seperator [6]",
        "  - unexpected: params/image_newline",
        "  - params/decoder/norm/scale is [6], expected [7]",
    ]


def test_shards_are_read_onto_a_mesh(params):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    specs = {
        "params": {
            "decoder": {
                "norm": {"scale": PartitionSpec()},
                "moe_1": {"experts": PartitionSpec("a", "b", "c")},
            },
            "image_newline": PartitionSpec(("a",)),
        },
        "router": {"decoder": {"moe_1": {"bias": PartitionSpec()}}},
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    loaded = load_params(params, SHAPES, dtype=jnp.float32, shardings=shardings)
    jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding or pytest.fail(), loaded,
                 shardings)  # fmt: skip
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(TREE), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want.astype(np.float32))
    part = loaded["params"]["decoder"]["moe_1"]["experts"].addressable_shards[0]
    assert part.data.shape == (1, 2, 3)


def test_part_of_an_array_across_chunks(tmp_path):
    import tensorstore as ts

    values = np.arange(10 * 7).reshape(10, 7)
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{tmp_path}/"},
            "metadata": {"chunks": [3, 7]}}  # fmt: skip
    spec["kvstore"]["path"] = "params.x/"
    ts.open(spec, create=True, shape=[10, 7], dtype="int64").result().write(values).result()
    stored = ParamStore(tmp_path).open("params/x")
    np.testing.assert_array_equal(read_array(stored), values)
    part = read_array(stored, (slice(2, 8), slice(1, 3)), np.int32)
    np.testing.assert_array_equal(part, values[2:8, 1:3])
    assert part.dtype == np.int32
    assert part.ctypes.data % 64 == 0


def test_directories_without_parameters(tmp_path):
    with pytest.raises(CheckpointError, match="holds no parameters"):
        load_params(tmp_path)


def test_importing_the_package_stays_light():
    import subprocess
    import sys

    code = (
        "import sys, vl2jax.checkpoints.model_dir, vl2jax.common.progress\n"
        "print([m for m in ('orbax', 'tensorstore', 'grain') if m in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert output.strip() == "[]"
