"""Tests of what conversion reads: small files, placeholders, quantised and damaged weights."""

import json
import shutil
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from convert_case import MICRO, write_source
from safetensors import safe_open
from safetensors.numpy import save_file

from convert import to_jax
from convert.plan import make_plan
from convert.source import ConversionError
from vl2jax.checkpoints.model_dir import read_model_dir
from vl2jax.common.errors import UserError
from vl2jax.processing.processor import Processor

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 7847652\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "hf", dtype="F32")


@pytest.fixture
def changed(source, tmp_path) -> Path:
    """A copy of the source, which a test may change."""
    return Path(shutil.copytree(source, tmp_path / "hf"))


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    with safe_open(directory / "model.safetensors", "np") as held:
        return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def run(capsys, monkeypatch, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, args)])
    code = to_jax.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Small files.


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", LFS, "config.json: a Git LFS pointer"),
        ("tokenizer.json", LFS, "tokenizer.json: a Git LFS pointer"),
        ("tokenizer_config.json", LFS, "tokenizer_config.json: a Git LFS pointer"),
        ("processor_config.json", LFS, "processor_config.json: a Git LFS pointer"),
        ("generation_config.json", LFS, "generation_config.json: a Git LFS pointer"),
        ("model.safetensors", LFS, "model.safetensors: a Git LFS pointer"),
        ("tokenizer.json", b'{"version": "1.0"}', "tokenizer.json: decoder must be ByteLevel"),
        ("tokenizer.json", b'{"decoder":{"type":"ByteLevel"}}', "not a tokenizer that works"),
        (
            "processor_config.json",
            b"{}",
            "'candidate_resolutions', 'patch_size', 'downsample_ratio",
        ),
        ("config.json", b'{"vision_config": 2, "language_config": {}}', "vision_config must be an"),
        ("tokenizer_config.json", b"<html>404", "tokenizer_config.json: a web page"),
    ],
)
def test_files_are_checked_at_conversion(
    changed, tmp_path, capsys, monkeypatch, flags, name, content, words
):
    (changed / name).write_bytes(content)
    code, text, errors = run(capsys, monkeypatch, changed, tmp_path / "out", *flags)
    assert (code, text) == (1, "")
    assert errors.startswith(f"error: {changed}: ")
    assert words in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_all_problems_of_small_files_together(changed):
    (changed / "tokenizer.json").write_bytes(LFS)
    edit(changed / "processor_config.json", patch_size=16)
    edit(changed / "config.json", tile_tag="1D")
    with pytest.raises(ConversionError) as error:
        make_plan(changed, None)
    assert len(error.value.problems) == 2  # without the architecture, sizes are not compared
    edit(changed / "config.json", tile_tag="2D")
    with pytest.raises(ConversionError) as error:
        make_plan(changed, None)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "tokenizer.json",
        "processor_config.json",
    ]


def test_inert_fields_are_named_once(changed, tmp_path, capsys, monkeypatch):
    edit(changed / "config.json", unsloth_version="2025.3", torch_dtype="float32")
    edit(changed / "processor_config.json", chat_template="{{x}}")
    code, _, errors = run(capsys, monkeypatch, changed, tmp_path / "out")
    assert code == 0
    for line in (
        "config.json: ignored, because they do not change the model: unsloth_version\n",
        "processor_config.json: ignored, because they do not change the model: chat_template\n",
    ):
        assert errors.count(line) == 1
    config = read_model_dir(tmp_path / "out").config
    assert Processor.from_dir(tmp_path / "out", config).settings.sft_format == "deepseek"


def test_a_tokenizer_truncates_nothing(changed):
    """Truncation and padding in the file are settings of the program that wrote it."""
    truncation = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    plain = Processor.from_dir(changed, MICRO).tokenizer.encode("abab" * 5)
    edit(changed / "tokenizer.json", truncation=truncation, padding=padding)
    assert Processor.from_dir(changed, MICRO).tokenizer.encode("abab" * 5) == plain


# Weights.


def test_many_placeholders_are_named_once_each(tmp_path):
    source = write_source(tmp_path / "hf", dtype="F32", shard_size=12_000)
    shards = sorted(source.glob("*.safetensors"))
    for shard in shards:
        shard.write_bytes(LFS)
    with pytest.raises(ConversionError) as error:
        make_plan(source, None)
    assert len(error.value.problems) == 1
    message = str(error.value)
    assert f"{shards[0].name} and {len(shards) - 1} more files: a Git LFS pointer" in message


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("fp8", "quantised (fp8: "),
        ("bitsandbytes", "quantised (bitsandbytes: "),
        ("GPTQ", "quantised (GPTQ or AWQ: "),
        ("compressed", "quantised (compressed-tensors: "),
        ("int8", "quantised (int8 or 4 bits: "),
    ],
)
def test_quantised_weights_are_one_line(changed, method, words):
    tensors = tensors_of(changed)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        base, values = name.removesuffix(".weight"), tensors.pop(name)
        small = np.zeros((2, 2), np.float32)
        if method == "fp8":
            tensors[name] = values.astype(ml_dtypes.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = small
        elif method == "bitsandbytes":
            tensors[name] = np.zeros((values.size // 2, 1), np.uint8)
            tensors[f"{name}.absmax"] = small.astype(np.uint8)
            tensors[f"{name}.quant_map"] = small
            tensors[f"{name}.quant_state.bitsandbytes__nf4"] = small.astype(np.uint8)
        elif method == "GPTQ":
            tensors[f"{base}.qweight"] = np.zeros((2, 2), np.int32)
            tensors[f"{base}.qzeros"] = np.zeros((2, 2), np.int32)
            tensors[f"{base}.scales"] = small.astype(np.float16)
        elif method == "compressed":
            tensors[f"{base}.weight_packed"] = np.zeros((2, 2), np.int32)
            tensors[f"{base}.weight_scale"] = small
        else:
            tensors[name] = values.astype(np.int8)
    save_file(tensors, changed / "model.safetensors")
    edit(changed / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(ConversionError) as error:
        make_plan(changed, None)
    message = str(error.value)
    assert words in message.replace("fp8 and compressed-tensors", "compressed-tensors")
    assert "conversion reads F32, F16 and BF16" in message
    assert "\n" not in message and len(message) < 700


def test_weights_in_another_place(changed):
    (changed / "model.safetensors").rename(changed / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match="PEFT adapter, not a model; merge it"):
        make_plan(changed, None)
    (changed / "adapter_model.safetensors").rename(changed / "model.gguf")
    with pytest.raises(ConversionError, match=r"GGUF are not supported; get the safetensors"):
        make_plan(changed, None)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_weights_that_are_not_finite_are_counted(tmp_path, capsys, monkeypatch, dtype):
    source = write_source(tmp_path / "hf", dtype=dtype)
    tensors = tensors_of(source)
    tensors["image_newline"][:3] = np.nan
    tensors["language.model.norm.weight"][1] = -np.inf
    tensors["language.model.norm.weight"][2] = np.nan
    tensors["vision.attn_pool.latent"][:] = np.nan  # is dropped, so it does not matter
    save_file(tensors, source / "model.safetensors")
    report = (
        "5 weights in 2 tensors are not finite: image_newline (3 NaN and 0 infinite of 12),"
        " language.model.norm.weight (1 NaN and 1 infinite of 12)"
    )
    code, _, errors = run(capsys, monkeypatch, source, tmp_path / "out", "--verify")
    assert code == 0
    assert f"warning: {report}\n" in errors
    code, _, errors = run(capsys, monkeypatch, source, tmp_path / "strict", "--strict")
    assert code == 1
    assert f"error: {source}: {report}; without --strict" in errors
    assert not (tmp_path / "strict").exists()


def test_values_that_bfloat16_does_not_hold_are_counted(changed, tmp_path):
    tensors = tensors_of(changed)
    tensors["image_newline"][0] = np.finfo(np.float32).max
    save_file(tensors, changed / "model.safetensors")
    to_jax.convert(changed, tmp_path / "as_it_is", strict=True)
    with pytest.raises(UserError, match="1 weights in 1 tensors are not finite: image_newline"):
        to_jax.convert(changed, tmp_path / "out", dtype="bfloat16", strict=True)


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(a={"dtype": "F32", "shape": [2**62] * 9, "data_offsets": [0, 4]}), "whole numbers"),
        (header(a={"dtype": "F32", "shape": [1] * 10**5, "data_offsets": [0, 4]}), "whole numbers"),
        (header(a={"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}), "whole numbers"),
        (header(a={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}), "whole numbers"),
        (header(a={"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}), "whole numbers"),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [0]}), "whole numbers"),
        (header(a={"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}), "dtype ['F32']"),
        (header(a=None), "dtype None"),
        (header(**{"x\ny" * 10_000: 7}), "dtype None"),
        (
            header(
                a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                c={"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
            )
            + bytes(24),
            "overlap or leave gaps",
        ),
        (struct.pack("<Q", 200) + b'{"a":1,"a":1}'.ljust(200), "the key 'a' is there twice"),
        (struct.pack("<Q", 10**5) + b'{"a":' * 20_000, "nested too deeply"),
        (struct.pack("<Q", 2) + b"{}" + bytes(9), "longer than it should be"),
    ],
)
def test_headers_that_are_wrong(changed, content, words):
    (changed / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError) as error:
        make_plan(changed, None)
    message = str(error.value)
    assert words in message
    assert "\n" not in message and len(message) < 600


def test_reports_are_bounded(changed):
    tensors = tensors_of(changed)
    other = {name: np.zeros(7, np.int64) for name in tensors}
    more = {f"stranger.{'x' * 5000}.{n}": np.zeros(1, np.float32) for n in range(50)}
    save_file(other | more, changed / "model.safetensors")
    with pytest.raises(ConversionError) as error:
        make_plan(changed, None)
    message = str(error.value)
    assert len(message.splitlines()) <= 21 and max(map(len, message.splitlines())) < 500
    assert "tensors the model does not have (50)" in message
    assert "more tensors have another shape" in message
