"""Fuzz targets: the files of a Hugging Face checkpoint that conversion and programs read.

`config.json`, `processor_config.json`, the tokenizer's files, the index and the headers of
safetensors files, each with changed bytes and with changed values.
"""

import copy
import json
import struct

import hypothesis.strategies as st
import pytest
from convert_case import MICRO, write_source
from fuzz_case import fuzz, mutated

from convert.mapping import expand
from convert.source import INDEX_FILE, scan
from vl2jax.common.errors import UserError
from vl2jax.common.json_file import object_in
from vl2jax.config import VL2Config
from vl2jax.processing.processor import Processor

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53, 2**63, -(2**70), 10**30, 1e308, 1e-300, 0.0, -0.0]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=9),
    st.sampled_from(["", "<image>", "ByteLevel", "BPE", "yarn", "default", "x" * 5000, "\ud800"]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "drop", "add", "swap"]), TEXTS, VALUES),
    min_size=1,
    max_size=4,
)


def places(value, found=None):
    """All (container, key) pairs of a nested JSON value."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        found.append((value, key))
        if isinstance(inner, dict | list):
            places(inner, found)
    return found


def edited(whole, edits) -> bytes:
    """A JSON object with changed values, as text; NaN and infinity are written as Python does."""
    value = copy.deepcopy(whole)
    for share, kind, name, new in edits:
        found = places(value)
        if not found:
            break
        container, key = found[min(int(share * len(found)), len(found) - 1)]
        if kind == "set":
            container[key] = new
        elif kind == "drop":
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[name] = new
        elif kind == "swap":
            other, at = found[len(found) // 2]
            container[key] = copy.deepcopy(other[at])
    return json.dumps(value).encode()


def files(whole) -> st.SearchStrategy[bytes]:
    """Contents of a JSON file: with changed values, and with changed bytes."""
    content = json.dumps(whole).encode()
    return EDITS.map(lambda edits: edited(whole, edits)) | mutated([content, content[:300]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("fuzz") / "hf", dtype="F32")


def test_config(data_dir, tmp_path):
    whole = json.loads((data_dir / "mini-extra" / "config.json").read_text())

    def read(content):
        config = VL2Config.from_hf(object_in(tmp_path / "config.json", content))
        assert VL2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
        if config.decoder.num_hidden_layers * (config.decoder.n_routed_experts or 1) < 1000:
            expand(config)

    assert fuzz(files(whole), read)


@pytest.mark.parametrize(
    "name",
    ["processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
)
def test_tokenizer_and_processor(source, tmp_path, name):
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if name == "special_tokens_map.json":
        (tmp_path / "tokenizer_config.json").write_text("{}")
    whole = json.loads((source / name).read_text())

    def read(content):
        (tmp_path / name).write_bytes(content)
        tokenizer = Processor.from_dir(tmp_path, MICRO).tokenizer
        tokenizer.decode(tokenizer.encode("a b <image>图 <|ref|>ab<|/ref|>\n"))

    assert fuzz(files(whole), read)


def first_problem(directory) -> None:
    """Scans a checkpoint, and raises its first problem."""
    _, problems = scan(directory)
    assert all(len(problem) < 700 and problem.isprintable() for problem in problems), problems
    if problems:
        raise UserError(problems[0])


def test_index(tmp_path):
    source = write_source(tmp_path / "hf", dtype="F32", shard_size=15_000)
    whole = json.loads((source / INDEX_FILE).read_text())

    def read(content):
        (source / INDEX_FILE).write_bytes(content)
        first_problem(source)

    assert fuzz(files(whole), read)


def test_safetensors_header(source, tmp_path):
    content = (source / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    few = {name: entry for name, entry in header.items() if name != "__metadata__"}
    few = dict(list(few.items())[:4])
    end = max(entry["data_offsets"][1] for entry in few.values())

    def with_length(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    changed = EDITS.map(lambda edits: with_length(edited(few, edits)) + data[:end])
    whole = with_length(json.dumps(few).encode()) + data[:end]

    def read(content):
        (tmp_path / "model.safetensors").write_bytes(content)
        first_problem(tmp_path)

    assert fuzz(changed | mutated([whole, content[: 8 + size]]), read)
