"""Tests of conversion in both directions: mapping, exactness, error reports, interruptions."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from convert_case import MICRO, read_all, write_source
from safetensors import safe_open
from safetensors.numpy import save_file

from convert import mapping, staging, stopping, to_hf, to_jax
from convert.axes import sized
from convert.plan import make_plan
from convert.source import ConversionError
from vl2jax.checkpoints.model_dir import read_model_dir
from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.config import architecture as presets


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "hf", dtype="F32")


@pytest.fixture
def broken(source, tmp_path) -> Path:
    """A copy of the source, which a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "broken"))


def problems_of(directory: Path) -> str:
    with pytest.raises(ConversionError) as error:
        make_plan(directory, None)
    return str(error.value)


# The mapping.


def test_axes_say_both_shapes_and_both_directions():
    axes = sized("(H K) D -> D H K", {"H": 2, "K": 3, "D": 4})
    assert (axes.hf_shape, axes.shape, axes.split_axis) == ((6, 4), (4, 2, 3), None)
    there = np.arange(24).reshape(6, 4)
    here = axes.forward(there)
    assert here.shape == (4, 2, 3)
    assert here[1, 1, 2] == there[5, 1] == 21
    np.testing.assert_array_equal(axes.backward(here), there)


def test_axes_squeeze_ones_and_take_numbers_as_sizes():
    position = sized("1 P W -> P W", {"P": 2, "W": 3})
    assert (position.hf_shape, position.shape) == ((1, 2, 3), (2, 3))
    conv = sized("W 3 p q -> p q 3 W", {"W": 5, "p": 2, "q": 2})
    assert (conv.hf_shape, conv.shape) == ((5, 3, 2, 2), (2, 2, 3, 5))
    there = np.arange(60).reshape(5, 3, 2, 2)
    assert conv.forward(there)[1, 0, 2, 4] == there[4, 2, 1, 0]
    np.testing.assert_array_equal(conv.backward(conv.forward(there)), there)


def test_axes_move_some_rows_of_a_large_table():
    axes = sized("vocab D -> D vocab", {"vocab": 5, "D": 2})
    there = np.arange(10).reshape(5, 2)
    here = axes.forward(there[2:4])
    np.testing.assert_array_equal(here, [[4, 6], [5, 7]])
    np.testing.assert_array_equal(axes.backward(here), there[2:4])


@pytest.mark.parametrize(
    ("size", "tensors", "parameters"), [("tiny", 2582, 48), ("small", 5639, 50), ("base", 6973, 51)]
)
def test_table_counts_of_the_released_sizes(size, tensors, parameters):
    entries = mapping.expand(getattr(presets, size)())
    assert len({entry.hf for entry in entries}) == len(entries) == tensors
    assert len(mapping.leaves(entries)) == parameters


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_table_is_a_bijection_with_the_manifest(size, reference):
    manifest = json.loads((reference / f"manifest-{size}.json").read_text())
    entries = mapping.expand(getattr(presets, size)())
    mapped = {entry.hf: list(entry.axes.hf_shape) for entry in entries}
    assert len(mapped) == len(entries)
    assert mapped == {name: shape for name, (shape, _) in manifest.items()}
    # Each element of each parameter is filled by exactly one tensor.
    for leaf in mapping.leaves(entries).values():
        assert len({entry.index for entry in leaf.entries}) == len(leaf.entries)
        assert sum(np.prod(e.axes.shape, dtype=int) for e in leaf.entries) == np.prod(leaf.shape)


def test_target_shapes_of_base():
    shapes = mapping.target_shapes(presets.base())
    run = "decoder/moe_1"
    assert shapes[f"params/{run}/mlp/experts/gate_proj"] == (29, 72, 2560, 1536)
    assert shapes[f"params/{run}/mlp/experts/down_proj"] == (29, 72, 1536, 2560)
    assert shapes[f"params/{run}/self_attn/kv_b_proj/kernel"] == (29, 512, 32, 256)
    assert shapes[f"params/{run}/self_attn/o_proj/kernel"] == (29, 32, 128, 2560)
    assert shapes[f"router/{run}/mlp/gate/e_score_correction_bias"] == (29, 72)
    assert shapes["params/decoder/dense_0/mlp/down_proj/kernel"] == (1, 12288, 2560)
    assert shapes["params/vision/blocks/attn/qkv/kernel"] == (27, 1152, 3, 16, 72)
    assert shapes["params/vision/patch_embed/kernel"] == (14, 14, 3, 1152)
    assert shapes["params/decoder/lm_head/kernel"] == (2560, 129280)


# Exactness.


def test_parameters_are_where_they_belong_for_plain_orbax(source, tmp_path):
    import orbax.checkpoint as ocp

    out = tmp_path / "out"
    to_jax.convert(source, out, check=True)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(out / "params")
    params = tree["params"]
    with safe_open(source / "model.safetensors", "np") as held:
        moe = params["decoder"]["moe_1"]
        expert = held.get_tensor("language.model.layers.2.mlp.experts.3.up_proj.weight")
        np.testing.assert_array_equal(moe["mlp"]["experts"]["up_proj"][1, 3], expert.T)
        query = held.get_tensor("language.model.layers.1.self_attn.q_proj.weight")
        np.testing.assert_array_equal(
            moe["self_attn"]["q_proj"]["kernel"][0], query.T.reshape(12, 2, 5)
        )
        output = held.get_tensor("language.model.layers.0.self_attn.o_proj.weight")
        np.testing.assert_array_equal(
            params["decoder"]["dense_0"]["self_attn"]["o_proj"]["kernel"][0],
            output.T.reshape(2, 4, 12),
        )
        qkv = held.get_tensor("vision.blocks.1.attn.qkv.bias")
        np.testing.assert_array_equal(
            params["vision"]["blocks"]["attn"]["qkv"]["bias"][1], qkv.reshape(3, 2, 4)
        )
        bias = held.get_tensor("language.model.layers.2.mlp.gate.e_score_correction_bias")
        np.testing.assert_array_equal(
            tree["router"]["decoder"]["moe_1"]["mlp"]["gate"]["e_score_correction_bias"][1], bias
        )
        head = held.get_tensor("language.lm_head.weight")
        np.testing.assert_array_equal(params["decoder"]["lm_head"]["kernel"], head.T)


@pytest.mark.parametrize(
    ("dtype", "stored", "shard_size"),
    [("F32", "float32", 10**9), ("BF16", "bfloat16", 3000), ("F16", "float32", 10**9)],
)
def test_there_and_back_changes_no_bit(tmp_path, dtype, stored, shard_size):
    source = write_source(tmp_path / "hf", dtype=dtype, shard_size=shard_size)
    to_jax.convert(source, tmp_path / "ckpt", check=True)
    model = read_model_dir(tmp_path / "ckpt")
    assert (model.dtype, SOURCE_NAMES[model.source_dtype], model.config) == (stored, dtype, MICRO)
    notes = to_hf.convert(tmp_path / "ckpt", tmp_path / "back", shard_size=5000)
    before, after = read_all(source), read_all(tmp_path / "back")
    dropped = {name for name in before if name.startswith("vision.attn_pool.")}
    assert len(dropped) == 13
    assert after == {name: x for name, x in before.items() if name not in dropped}
    assert len(notes) == 1
    assert notes[0].startswith("not written: 13 tensors (vision.attn_pool.latent,")
    assert "never used" in notes[0]
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    # to_jax accepts the output of to_hf, although the dropped tensors are missing.
    to_jax.convert(tmp_path / "back", tmp_path / "again")
    assert read_model_dir(tmp_path / "again").dropped == []


SOURCE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def test_every_tensor_keeps_its_own_dtype(source, tmp_path):
    mixed = Path(shutil.copytree(source, tmp_path / "mixed"))
    tensors = {}
    with safe_open(source / "model.safetensors", "np") as held:
        for name in held.keys():  # noqa: SIM118
            exact = "e_score" in name or name == "language.model.layers.1.input_layernorm.weight"
            x = held.get_tensor(name)
            tensors[name] = x if exact else x.astype(ml_dtypes.bfloat16)
    save_file(tensors, mixed / "model.safetensors")
    to_jax.convert(mixed, tmp_path / "ckpt", check=True)
    model = read_model_dir(tmp_path / "ckpt")
    assert (model.dtype, model.source_dtype) == ("bfloat16", "bfloat16")
    assert model.source_dtypes == {
        "language.model.layers.1.input_layernorm.weight": "float32",
        "language.model.layers.1.mlp.gate.e_score_correction_bias": "float32",
        "language.model.layers.2.mlp.gate.e_score_correction_bias": "float32",
    }
    to_hf.convert(tmp_path / "ckpt", tmp_path / "back")
    before = {k: v for k, v in read_all(mixed).items() if "attn_pool" not in k}
    assert read_all(tmp_path / "back") == before


def test_requested_dtype_leaves_the_router_state_alone(source, tmp_path):
    to_jax.convert(source, tmp_path / "ckpt", dtype="bfloat16", check=True)
    store = to_jax.ParamStore(tmp_path / "ckpt" / "params")
    dtypes = {path: store.open(path).dtype.name for path in store.paths}
    routers = [path for path in dtypes if path.startswith("router/")]
    assert routers == ["router/decoder/moe_1/mlp/gate/e_score_correction_bias"]
    assert dtypes.pop(routers[0]) == "float32"
    assert set(dtypes.values()) == {"bfloat16"}


def test_large_tensors_are_moved_some_rows_at_a_time(source, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.pieces.PIECE_BYTES", 200)
    to_jax.convert(source, tmp_path / "ckpt", check=True)
    store = to_jax.ParamStore(tmp_path / "ckpt" / "params")
    head = store.open("params/decoder/lm_head/kernel")
    assert (head.shape, head.chunk_layout.read_chunk.shape) == ((12, 20), (12, 4))
    to_hf.convert(tmp_path / "ckpt", tmp_path / "back")
    before = {k: v for k, v in read_all(source).items() if "attn_pool" not in k}
    assert read_all(tmp_path / "back") == before


def check_round_trip(mini: Path, small_files: Path, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(mini, tmp_path / "hf", ignore=shutil.ignore_patterns("golden")))
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copyfile(small_files / name, hf / name)
    to_jax.convert(hf, tmp_path / "ckpt", check=True)
    to_hf.convert(tmp_path / "ckpt", tmp_path / "back")
    before = {k: v for k, v in read_all(hf).items() if not k.startswith("vision.attn_pool.")}
    assert read_all(tmp_path / "back") == before
    written = json.loads((tmp_path / "back/config.json").read_text())
    original = json.loads((hf / "config.json").read_text())
    assert VL2Config.from_hf(written) == VL2Config.from_hf(original)


def test_round_trip_of_a_mini(data_dir, tmp_path):
    check_round_trip(data_dir / "mini-small", data_dir / "mini-small", tmp_path)


@pytest.mark.parametrize("mini", ["tiny", "small", "base", "extra", "small-bf16"])
def test_round_trip_of_all_minis(mini, reference, tmp_path):
    directory = reference / f"mini-{mini}"
    # The bfloat16 one has weights only.
    small_files = directory if (directory / "tokenizer.json").exists() else reference / "mini-small"
    check_round_trip(directory, small_files, tmp_path)


# Sharded files.


def test_shards_are_named_as_released(source, tmp_path):
    to_jax.convert(source, tmp_path / "ckpt")
    to_hf.convert(tmp_path / "ckpt", tmp_path / "back", shard_size=20_000)
    names = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names[0] == f"model-00001-of-{count:06}.safetensors"
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(names)
    assert index["metadata"]["total_size"] == sum(
        len(x[2]) for x in read_all(tmp_path / "back").values()
    )
    sizes = dict.fromkeys(names, 0)
    for name, (_, _, bits) in read_all(tmp_path / "back").items():
        sizes[index["weight_map"][name]] += len(bits)
    assert max(sizes.values()) <= 20_000


# Error reports, which list all problems.


def test_all_problems_of_the_tensors_in_one_report(broken):
    tensors = {}
    with safe_open(broken / "model.safetensors", "np") as held:
        for name in held.keys():  # noqa: SIM118
            tensors[name] = held.get_tensor(name)
    del tensors["image_newline"], tensors["language.model.layers.1.mlp.experts.0.up_proj.weight"]
    tensors["stranger.weight"] = np.zeros(3, np.float32)
    tensors["view_seperator"] = np.zeros(13, np.float32)
    tensors["vision.norm.bias"] = np.zeros(8, np.int64)
    save_file(tensors, broken / "model.safetensors")
    (broken / "tokenizer.json").unlink()
    assert problems_of(broken).splitlines() == [
        f"{broken}: 5 problems",
        "  - tokenizer.json: not found",
        "  - missing tensors (2): image_newline,"
        " language.model.layers.1.mlp.experts.0.up_proj.weight",
        "  - tensors the model does not have (1): stranger.weight",
        "  - view_seperator: shape [13], the model has [12]",
        "  - dtype I64 (1): vision.norm.bias; expected one of F32, F16, BF16",
    ]


def test_all_problems_of_the_files_in_one_report(tmp_path):
    source = write_source(tmp_path / "hf", dtype="F32", shard_size=12_000)
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) >= 4
    index_file = source / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    held = [name for name, file in index["weight_map"].items() if file == shards[3].name]
    index["weight_map"]["ghost"] = shards[3].name
    del index["weight_map"][held[0]]
    index_file.write_text(json.dumps(index))
    shards[0].unlink()
    os.truncate(shards[1], shards[1].stat().st_size - 10)
    content = bytearray(shards[2].read_bytes())
    content[8:10] = b"!!"
    shards[2].write_bytes(content)
    report = problems_of(source)
    assert f"index.json names {shards[0].name} for " in report
    assert f"{shards[1].name}: truncated: its header tells of " in report
    assert f"{shards[2].name}: bad safetensors header (Expecting value" in report
    assert f"{shards[3].name} does not hold, as the index says: ghost" in report
    assert f"{shards[3].name} holds, against the index: {held[0]}" in report
    # Tensors in unreadable files are not also reported as missing.
    assert f"missing tensors (1): {held[0]}" in report
    assert "6 problems" in report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole safetensors file (a header of 0 bytes in a file of 0)"),
        (struct.pack("<Q", 10**12) + b"{}", "not a whole safetensors file (a header of 1000000000"),
        (struct.pack("<Q", 2) + b"[]", "bad safetensors header (expected an object {...}, got [])"),
        (
            struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}      ',
            "bad safetensors header (a: 4 bytes for F32[2])",
        ),
        (
            struct.pack("<Q", 60)
            + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}      '
            + bytes(8),
            "its tensors overlap or leave gaps",
        ),
    ],
)
def test_bad_safetensors_files(broken, content, message):
    (broken / "model.safetensors").write_bytes(content)
    report = problems_of(broken)
    assert report.startswith(f"{broken}: model.safetensors: {message}")
    assert "\n" not in report


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "model.safetensors.index.json: not valid JSON (Expecting property name"),
        ("{}", "its weight_map must name tensors, got None"),
        ('{"weight_map": {}}', "its weight_map must name tensors, got {}"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "weight_map['a'] is '../x.safetensors', exp"),
    ],
)
def test_bad_index(broken, index, message):
    (broken / "model.safetensors.index.json").write_text(index)
    report = problems_of(broken)
    assert message in report
    assert "\n" not in report


def test_config_problems_do_not_hide_others(broken):
    content = json.loads((broken / "config.json").read_text())
    content["tile_tag"] = "1D"
    (broken / "config.json").write_text(json.dumps(content))
    (broken / "processor_config.json").unlink()
    report = problems_of(broken)
    assert "tile_tag" in report
    assert "processor_config.json: not found" in report
    (broken / "config.json").unlink()
    assert "config.json: not found" in problems_of(broken)


def test_verify_finds_a_flipped_bit(source, tmp_path):
    out = tmp_path / "out"
    to_jax.convert(source, out)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)  # in `language.lm_head.weight`, the last tensor
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    with make_plan(source, None).source, pytest.raises(ConversionError) as error:
        to_jax.verify(make_plan(other, None), out / "params")
    assert error.value.problems == [
        "language.lm_head.weight: params/decoder/lm_head/kernel[] differs"
    ]
    to_jax.verify(make_plan(source, None), out / "params")


def test_verify_reports_damaged_files(source, tmp_path):
    out = tmp_path / "out"
    to_jax.convert(source, out)
    for file in (out / "params/ocdbt.process_0/d").iterdir():
        content = bytearray(file.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|cannot be read|differs"):
        to_jax.verify(make_plan(source, None), out / "params")


# Atomic output.


def test_output_in_the_way(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    to_jax.convert(source, out)  # an empty directory may be replaced
    with pytest.raises(UserError, match="out exists and is not empty; choose another output or"):
        to_jax.convert(source, out)
    before = (out / "model.json").stat().st_ino
    to_jax.convert(source, out, overwrite=True)
    assert (out / "model.json").stat().st_ino != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.png").touch()
    with pytest.raises(UserError, match="photos is not something --overwrite may replace"):
        to_jax.convert(source, stranger, overwrite=True)
    assert (stranger / "cat.png").exists()


def test_full_disk_is_found_before_and_while_writing(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    needed = make_plan(source, None).nbytes + 64 * 2**20
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=rf"{needed} bytes .* may be needed, 1000 bytes"):
            to_jax.convert(source, out)

    def fails(*_):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [a=b]")

    with monkeypatch.context() as patch:
        patch.setattr(to_jax, "save_streamed", fails)
        with pytest.raises(OSError, match="the disk is full; nothing was left at"):
            to_jax.convert(source, out)
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from convert import plan, to_jax
read = plan.Plan.read
def slow(self, piece):
    time.sleep(0.05)
    return read(self, piece)
plan.Plan.read = slow
sys.exit(to_jax.main())
"""


def start_slow_conversion(source: Path, out: Path) -> subprocess.Popen:
    """Starts a conversion, and returns when it has started to write parameters."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, source, out],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    partial = out.with_name(out.name + ".partial")
    deadline = time.monotonic() + 60
    while not list(partial.glob("params*/ocdbt.process_0/d/*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_killed_conversion_leaves_nothing_that_loads(source, tmp_path):
    out = tmp_path / "out"
    process = start_slow_conversion(source, out)
    with pytest.raises(UserError, match=r"out\.partial is being written by another run"):
        to_jax.convert(source, out)
    process.kill()
    process.communicate()
    assert not out.exists()
    with pytest.raises(UserError, match="left by an interrupted conversion"):
        read_model_dir(tmp_path / "out.partial")
    to_jax.convert(source, out, check=True)
    assert read_model_dir(out).config == MICRO
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_late_writes_of_a_conversion_say_nothing(source, tmp_path, monkeypatch):
    """Errors of writes that end after their event loop was closed are hidden; others are not."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: shown.append(str(error.exc_value)))
    to_jax.convert(source, tmp_path / "out")
    for message in ("Event loop is closed", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(message), object=None))
    assert shown == ["another"]


def check_interrupted(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Checks that an interrupted conversion leaves nothing, and says so."""
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.strip().splitlines()[-1] == ("interrupted: nothing was left behind; run it again")
    assert "Traceback" not in errors
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_conversion_cleans_up(source, tmp_path, number):
    process = start_slow_conversion(source, tmp_path / "new" / "out")
    process.send_signal(number)
    check_interrupted(process, tmp_path, number)


LATE = """
import asyncio, concurrent.futures, glob, os, signal, sys, time
import tensorstore
pool = concurrent.futures.ThreadPoolExecutor(64)

class Late:
    "An array; experts reach the disk a while after their writing was asked for."
    def __init__(self, store):
        self.store = store
    def __getitem__(self, index):
        return Late(self.store[index])
    def write(self, values):
        expert = self.store.origin[1] if self.store.rank == 4 else -1
        if expert == SIGNALS_AT:
            for _ in range(TIMES):
                signal.raise_signal(signal.SIGINT)
        return asyncio.wrap_future(pool.submit(self.write_late, expert, values))
    def write_late(self, expert, values):
        if expert == FAILS_AT:
            raise OSError(28, "No space left on device")
        time.sleep(0.7 * max(expert, 0))
        for directory in glob.glob(sys.argv[2] + ".partial/params*/ocdbt.process_0/d"):
            open(os.path.join(directory, f"late_{expert}"), "w").close()
        self.store.write(values).result()

really_open, really_rmdir = tensorstore.open, os.rmdir
async def late_open(*args, **options):
    return Late(await really_open(*args, **options))
def slow_rmdir(path, **options):
    "What is written into a directory between its last file and its own removal keeps it."
    time.sleep(2.0 * (os.path.basename(path) == "d"))
    really_rmdir(path, **options)
tensorstore.open, os.rmdir = late_open, slow_rmdir
"""


def late_conversion(source: Path, out: Path, **numbers: int) -> subprocess.Popen:
    """Starts a conversion whose writes are slow; `numbers` set the constants of `LATE`."""
    script = LATE
    for name, value in ({"SIGNALS_AT": -2, "TIMES": 1, "FAILS_AT": -2} | numbers).items():
        script = script.replace(name, str(value))
    command = [sys.executable, "-c", script + SLOW, source, out]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("times", [1, 3])
def test_late_writers_are_waited_for(source, tmp_path, times):
    """After one Ctrl-C or several, the conversion waits for its writes."""
    process = late_conversion(source, tmp_path / "out", SIGNALS_AT=2, TIMES=times)
    check_interrupted(process, tmp_path, signal.SIGINT)


def test_other_writers_are_waited_for_when_one_fails(source, tmp_path):
    process = late_conversion(source, tmp_path / "out", FAILS_AT=1)
    _, errors = process.communicate(timeout=60)
    message = errors.strip().splitlines()[-1]
    assert message == f"error: the disk is full; nothing was left at {tmp_path / 'out'}"
    assert process.returncode == 1
    assert list(tmp_path.iterdir()) == []


AT_A_MOMENT = """
import signal, sys, threading
from convert import to_jax
source, out, delay = sys.argv[1:]
threading.Timer(float(delay), signal.raise_signal, [signal.SIGINT]).start()
to_jax.convert(source, out)
"""


def test_a_signal_at_any_moment(source, tmp_path):
    """Whenever a signal arrives, the output is complete or nothing is left."""
    stopped = 0
    for delay in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):
        out = tmp_path / f"{delay:.3f}"
        command = [sys.executable, "-c", AT_A_MOMENT, source, out, str(delay)]
        subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
        assert [path.name for path in tmp_path.iterdir()] == [out.name] * out.exists()
        stopped += not out.exists()
        if out.exists():
            assert read_model_dir(out).config == MICRO
            shutil.rmtree(out)
    assert stopped > 0


def test_interrupted_export_cleans_up(source, tmp_path, monkeypatch):
    to_jax.convert(source, tmp_path / "ckpt")

    def interrupts(*_):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)  # until the main thread has handled the signal
        return np.zeros(1)

    monkeypatch.setattr(to_hf, "read_array", interrupts)
    with pytest.raises(stopping.Interrupted) as interrupted:
        to_hf.convert(tmp_path / "ckpt", tmp_path / "back")
    assert interrupted.value.exit_code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)
    raise stopping.Stopped


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (lambda: fail(OSError(errno.ENOSPC, "No space")), 1, "error: the disk is full"),
        (lambda: fail(UserError("no such thing")), 1, "error: no such thing"),
        (interrupt, 130, "interrupted: "),
    ],
)
def test_what_could_not_be_removed_is_told(
    source, tmp_path, monkeypatch, capsys, end, code, message
):
    def refuses(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    def ends(*_):
        monkeypatch.setattr(shutil, "rmtree", refuses)
        end()

    monkeypatch.setattr(staging, "_REMOVAL_SECONDS", 0.1)
    monkeypatch.setattr(to_jax, "save_streamed", ends)
    found, _, errors = run(capsys, monkeypatch, to_jax, source, tmp_path / "out")
    left = f"{tmp_path / 'out.partial'} could not be removed (Permission denied)"
    told = message + left if message.endswith(": ") else f"{message}; {left}"
    assert (found, errors.strip().splitlines()[-1]) == (code, told)
    assert (tmp_path / "out.partial").is_dir()


def test_work_that_does_not_end_is_not_waited_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_PATIENCE", 0.1)
    go_on = threading.Event()

    def work(_):
        signal.raise_signal(signal.SIGINT)
        go_on.wait(30)

    with pytest.raises(stopping.Interrupted) as interrupted:
        stopping.run_stoppable(work, tmp_path / "out")
    go_on.set()
    assert interrupted.value.still_running
    (note,) = interrupted.value.__notes__
    assert note == f"writing to {tmp_path / 'out'} has not ended after 0 seconds"


# Command lines.


def run(capsys, monkeypatch, module, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, args)])
    code = module.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_dry_run_prints_the_table_and_writes_nothing(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    code, text, _ = run(capsys, monkeypatch, to_jax, source, out, "--dry_run")
    assert code == 0
    assert not list(tmp_path.iterdir())
    assert (
        "    8 x language.model.layers.{layer}.mlp.experts.{expert}.up_proj.weight [6, 12] ->"
        " params/decoder/moe_1/mlp/experts/up_proj float32[2, 4, 12, 6]   (M D -> D M)"
    ) in text
    assert "    1 x vision.attn_pool.latent [1, 1, 8] -> dropped" in text
    assert "never used" in text
    assert "parameters" in text.splitlines()[-1]


def test_command_lines_there_and_back(source, tmp_path, capsys, monkeypatch):
    args = (source, tmp_path / "out", "--verify", "--dtype", "float32")
    code, text, errors = run(capsys, monkeypatch, to_jax, *args)
    assert (code, text) == (0, f"wrote {tmp_path / 'out'}\n")
    assert "converting 100%" in errors
    assert "verifying 100%" in errors
    args = (tmp_path / "out", tmp_path / "back", "--shard_size", "10kB")
    code, text, errors = run(capsys, monkeypatch, to_hf, *args)
    assert (code, text) == (0, f"wrote {tmp_path / 'back'}\n")
    assert "not written: 13 tensors" in errors


@pytest.mark.parametrize(
    ("module", "path", "message"),
    [
        (to_jax, "absent", "error: {} does not exist; expected a Hugging Face checkpoint"),
        (to_jax, "file", "error: {} is not a directory; expected a Hugging Face checkpoint"),
        (to_hf, "absent", "error: checkpoint {} does not exist; expected the output of"),
        (to_hf, "hf", "error: {} is not a vl2jax checkpoint: it looks like a Hugging Face"),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, capsys, monkeypatch, module, path, message):
    (tmp_path / "file").touch()
    path = source if path == "hf" else tmp_path / path
    code, text, errors = run(capsys, monkeypatch, module, path, tmp_path / "out")
    assert (code, text) == (1, "")
    assert errors.startswith(message.format(path))
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5MiB", 1572864), ("700", 700), ("2 kB", 2000)]
)
def test_sizes(text, size):
    assert staging.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0GB", "GB"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="expected a size"):
        staging.parse_bytes(text)
