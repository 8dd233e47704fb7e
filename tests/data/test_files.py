"""Tests of data files of every kind as sources of rows, and of errors in malformed files."""

import base64
import bz2
import concurrent.futures
import gc
import gzip
import json
import lzma
import pickle
import sys

import numpy as np
import PIL.Image
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.data.files import open_source
from vl2jax.data.samples import read_sample
from vl2jax.processing.processor import Processor


@pytest.fixture(scope="module")
def processor(data_dir):
    folder = data_dir / "mini-small"
    config = VL2Config.from_hf(json.loads((folder / "config.json").read_text()))
    return Processor.from_dir(folder, config)


@pytest.fixture
def folder(tmp_path):
    """A folder with one image."""
    pixels = np.arange(60 * 120 * 3, dtype=np.uint32).reshape(60, 120, 3) % 251
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "wide.png")
    return tmp_path


def row(number, image="wide.png"):
    return {
        "conversations": [
            {"from": "human", "value": f"<image>\nsee {number}"},
            {"from": "gpt", "value": f"a{number}"},
        ],
        "image": image,
    }


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def write_array_record(path, rows):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for one in rows:
        writer.write(one if isinstance(one, bytes) else json.dumps(one).encode())
    writer.close()


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


WRITERS = {
    "rows.json": write_json,
    "rows.jsonl": write_lines,
    "rows.array_record": write_array_record,
    "rows.array_record-00000-of-00001": write_array_record,
    "rows.parquet": write_parquet,
}


def answers(source):
    return [source[index].messages[-1]["content"] for index in range(len(source))]


@pytest.fixture(params=WRITERS)
def five(request, folder):
    """The source of a file of each kind, with rows 0 to 4."""
    path = folder / request.param
    WRITERS[request.param](path, [row(number) for number in range(5)])
    return open_source(path)


def test_every_kind_gives_the_same_tokens(five, folder, processor):
    assert len(five) == 5
    for number in (4, 0, 2, 1, 3):
        found = read_sample(five[number], processor, mask_prompt=True)
        expected = processor.sample(
            [
                {"role": "user", "content": f"<image>\nsee {number}"},
                {"role": "assistant", "content": f"a{number}"},
            ],
            [folder / "wide.png"],
            inference=False,
            mask_prompt=True,
        )
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
        np.testing.assert_array_equal(found.tiles, expected.tiles)


def test_sources_are_like_lists(five):
    assert five[-1].where == five[np.int64(4)].where
    for index in (5, -6):
        with pytest.raises(IndexError, match="of a source with 5 rows"):
            five[index]
    assert [one.messages[-1]["content"] for one in five] == ["a0", "a1", "a2", "a3", "a4"]


def test_sources_go_to_processes_and_threads(five):
    expected = answers(five)
    assert answers(pickle.loads(pickle.dumps(five))) == expected
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: five[i % 5].messages[-1]["content"], range(200)))
    assert found == expected * 40


def test_rows_are_named(folder):
    write_json(folder / "a.json", {"data": [row(0), row(1)]})
    assert open_source(folder / "a.json")[1].where == f"{folder}/a.json row 2"
    (folder / "a.jsonl").write_text(
        "\ufeff" + json.dumps(row(0)) + "\n\n \r\n" + json.dumps(row(1)), encoding="utf-8"
    )
    source = open_source(folder / "a.jsonl")
    assert [one.where for one in source] == [f"{folder}/a.jsonl:1", f"{folder}/a.jsonl:4"]
    write_array_record(folder / "a.array_record", [row(0), row(1)])
    assert open_source(folder / "a.array_record")[1].where == f"{folder}/a.array_record row 2"


def test_folders_and_patterns(folder):
    write_json(folder / "b.json", [row(2)])
    write_lines(folder / "a.jsonl", [row(0), row(1)])
    write_array_record(folder / "c.array_record", [row(3)])
    assert answers(open_source(folder)) == ["a0", "a1", "a2", "a3"]
    assert answers(open_source(f"{folder}/*.json*")) == ["a0", "a1", "a2"]
    assert open_source(folder)[2].where == f"{folder}/b.json row 1"


def test_where_relative_paths_begin(folder):
    (folder / "texts").mkdir()
    write_lines(folder / "texts" / "a.jsonl", [row(0)])
    with pytest.raises(UserError, match=r"a.jsonl:1: image 1: .*texts/wide.png: cannot open"):
        open_source(folder / "texts" / "a.jsonl")[0]
    found = open_source(folder / "texts" / "a.jsonl", images_root=folder)[0]
    assert found.images == [str(folder / "wide.png")]


def test_json_lines_are_not_held_in_memory(folder):
    write_lines(folder / "big.jsonl", [row(number) | {"id": "x" * 10_000} for number in range(300)])
    source = open_source(folder / "big.jsonl")
    assert len(pickle.dumps(source)) < 10_000
    assert source[299].messages[-1]["content"] == "a299"


def test_pictures_in_records(folder, processor):
    content = (folder / "wide.png").read_bytes()
    text = base64.b64encode(content).decode()
    rows = [row(0), row(0, {"bytes": text}), row(0, f"data:image/png;base64,{text}")]
    write_array_record(folder / "a.array_record", rows)
    samples = [read_sample(one, processor) for one in open_source(folder / "a.array_record")]
    for sample in samples:
        np.testing.assert_array_equal(sample.tokens, samples[0].tokens)
        np.testing.assert_array_equal(sample.tiles, samples[0].tiles)
    assert samples[0].image_sizes == ((120, 60),)


def test_parquet(folder, processor):
    content = (folder / "wide.png").read_bytes()
    turns = [{"role": "user", "content": "see"}, {"role": "assistant", "content": "no"}]
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]
    write_parquet(
        folder / "a.parquet",
        [
            {"messages": turns, "images": [{"bytes": content, "path": "x.png"}]},
            {"messages": turns, "images": None},
            {"messages": turns, "images": [{"bytes": None, "path": "wide.png"}]},
        ],
    )
    write_parquet(folder / "b.parquet", [{"messages": parts, "images": [{"bytes": content}]}])
    asked = [{"role": "user", "content": "<image>\nsee"}, turns[1]]
    expected = processor.sample(asked, [content], inference=False)
    bare = processor.sample(turns, [], inference=False)
    found = [read_sample(one, processor) for one in open_source(f"{folder}/*.parquet")]
    for sample, same in zip(found, [expected, bare, expected, expected], strict=True):
        np.testing.assert_array_equal(sample.tokens, same.tokens)
        np.testing.assert_array_equal(sample.tiles, same.tiles)


def test_parquet_that_is_damaged(folder):
    write_parquet(folder / "a.parquet", [row(number) for number in range(4)])
    (folder / "not.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"not.parquet: not a parquet file"):
        open_source(folder / "not.parquet")
    source = open_source(folder / "a.parquet")
    content = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(UserError, match=r"a.parquet row 1: damaged parquet data"):
        source[0]


def test_parquet_without_pyarrow(folder, monkeypatch):
    (folder / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a.parquet: .*pip install 'vl2jax\[parquet\]'"):
        open_source(folder / "a.parquet")


def test_lines_that_cannot_be_read(folder):
    good = json.dumps(row(0)).encode()
    (folder / "a.jsonl").write_bytes(
        b"\n".join([good, good[:30], b'{"text": "\xff\xfe"}', b"7", b"[" * 100_000, good])
    )
    source = open_source(folder / "a.jsonl")
    assert len(source) == 6
    for index, reason in (
        (1, r"a.jsonl:2: not valid JSON \(.* at column \d+\); expected one whole JSON object"),
        (2, r"a.jsonl:3: not UTF-8 \(byte 0xff at offset 10\); save the file as UTF-8"),
        (3, r"a.jsonl:4: expected 'messages' .*; got int"),
        (4, r"a.jsonl:5: not valid JSON"),
    ):
        with pytest.raises(UserError, match=reason):
            source[index]
    assert source[5].messages[-1]["content"] == "a0"


def test_records_that_cannot_be_read(folder):
    write_array_record(folder / "a.array_record", [b"{", b"\xff", row(1, "gone.png"), row(3)])
    source = open_source(folder / "a.array_record")
    for index, reason in (
        (0, "row 1: not valid JSON"),
        (1, "row 2: not UTF-8"),
        (2, "row 3: image 1: .*gone.png: cannot open the picture"),
    ):
        with pytest.raises(UserError, match=f"a.array_record {reason}"):
            source[index]
    (folder / "not.array_record").write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"not.array_record: not an ArrayRecord file"):
        open_source(folder / "not.array_record")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b'[{"text": "a"},\n {"text" "b"}]',
            r":2: not valid JSON \(Expecting ':' delimiter at col",
        ),
        (b'[\n{"text": "a"}]\n{"text": "b"}', r":3: not valid JSON \(Extra data .*\.jsonl"),
        (b'[{"text": "a"}, {"text": "b"', r":1: not valid JSON"),
        (b'[\n {"text": "a"},\n {"text": "b"}', r":3: not valid JSON"),
        (b'[{"text":\n"\xff"}]', r":2: not UTF-8 \(byte 0xff"),
        (b'{"id": "a"}', r": expected a list of rows, .* got the keys \['id'\]"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r": a Git LFS pointer"),
        (b'"a"', r": expected a list of rows, .* got str"),
        (b"[]", r": no rows"),
        (b"[" * 100_000, r": not valid JSON"),
        (b"", r":1: not valid JSON"),
        (b"\x1f\x8b no", r": damaged compressed file"),
        ('[{"text": "a"}]'.encode("utf-16")[:-1], r": not utf-16 \(.*save the file as UTF-8"),
    ],
)
def test_json_that_cannot_be_opened(folder, content, reason):
    (folder / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=f"a.json{reason}"):
        open_source(folder / "a.json")


def test_rows_of_a_json_file_that_are_malformed(folder):
    write_json(folder / "a.json", [row(0), {"role": "user", "content": "a"}])
    with pytest.raises(
        UserError, match=r"a.json row 2: expected 'messages'.*\['content', 'role'\]"
    ):
        open_source(folder / "a.json")[1]


def test_files_that_are_not_there(folder):
    with pytest.raises(UserError, match=r"gone.jsonl: no such file"):
        open_source(folder / "gone.jsonl")
    with pytest.raises(UserError, match=r"no data file in this folder"):
        open_source(folder)
    (folder / "a.csv").write_text("a")
    with pytest.raises(UserError, match=r"a.csv: unknown kind of data file"):
        open_source(folder / "a.csv")
    (folder / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"a.jsonl: no rows"):
        open_source(folder / "a.jsonl")


LISTED = [row(number) for number in range(4)]
LINES = "\n".join(map(json.dumps, LISTED))
CONTAINERS = {
    "list": json.dumps(LISTED),
    "pretty list": json.dumps(LISTED, indent=1),
    "one row a line in a list": "[\n" + ",\n".join(map(json.dumps, LISTED)) + "\n]\n",
    "lines": LINES,
    "lines with blank ones": "\n\r\n" + LINES.replace("\n", "\r\n\n  \n") + "\n\n",
    "data": json.dumps({"data": LISTED}),
    "data and more": json.dumps({"version": 1, "data": LISTED, "tags": ["a"]}, indent=2),
    "rows": json.dumps({"rows": LISTED}),
    "annotations": json.dumps({"info": {"a": 1}, "annotations": LISTED}),
    "conversations of conversations": json.dumps({"conversations": LISTED}),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.JSON"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_the_content_decides_how_a_text_is_read(folder, container, name, encoding):
    (folder / name).write_bytes(CONTAINERS[container].encode(encoding))
    source = open_source(folder / name)
    assert answers(source) == ["a0", "a1", "a2", "a3"]
    assert answers(pickle.loads(pickle.dumps(source))) == ["a0", "a1", "a2", "a3"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_row(folder, name, indent):
    for value in (row(7), row(7)["conversations"]):
        value = value if isinstance(value, dict) else [{"from": "human", "value": "a"}, value[1]]
        (folder / name).write_text(json.dumps(value, indent=indent))
        assert answers(open_source(folder / name)) == ["a7"]


def zstd(content):
    return pytest.importorskip("zstandard").compress(content)


COMPRESSED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_compressed_files(folder, kind, name):
    for text in (LINES.encode(), json.dumps(LISTED).encode("utf-16")):
        content = COMPRESSED[kind](text)
        (folder / f"{name}.{kind}").write_bytes(content)
        source = open_source(folder / f"{name}.{kind}")
        assert answers(source) == ["a0", "a1", "a2", "a3"]
        assert str(folder / name) in source[1].where
    for damaged in (
        content[:-9],
        content[: len(content) // 2],
        content[:20] + b"no" + content[22:],
    ):
        (folder / f"{name}.{kind}").write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}.{kind}: damaged compressed file"):
            open_source(folder / f"{name}.{kind}")


def test_several_compressed_parts_and_other_names(folder):
    half = len(LINES) // 2
    for kind, compress in COMPRESSED.items():
        both = compress(LINES[:half].encode()) + compress(LINES[half:].encode())
        (folder / f"{kind}.jsonl").write_bytes(both)
        assert answers(open_source(folder / f"{kind}.jsonl")) == ["a0", "a1", "a2", "a3"]


def test_copies_of_compressed_files_are_removed(folder, monkeypatch):
    (folder / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "temporary"))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    source = open_source(folder / "a.jsonl.gz")
    assert len(list((folder / "temporary").iterdir())) == 1 and len(answers(source)) == 4
    del source
    assert not list((folder / "temporary").iterdir())
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(UserError, match="damaged compressed file"):
        open_source(folder / "a.jsonl.gz")
    gc.collect()  # the error holds the source
    assert not list((folder / "temporary").iterdir())


def test_zstd_without_its_package(folder, monkeypatch):
    (folder / "a.jsonl.zst").write_bytes(zstd(LINES.encode()))
    for module in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"a.jsonl.zst: .*pip install 'vl2jax\[zstd\]'"):
        open_source(folder / "a.jsonl.zst")


def test_a_first_line_that_is_malformed(folder):
    (folder / "a.jsonl").write_text("{broken\n" + LINES)
    source = open_source(folder / "a.jsonl")
    assert len(source) == 5 and source[1].messages[-1]["content"] == "a0"
    with pytest.raises(UserError, match=r"a.jsonl:1: not valid JSON"):
        source[0]


def test_row_groups_of_parquet_are_read_once(folder, monkeypatch):
    write_parquet(folder / "a.parquet", [row(number) for number in range(12)])
    parquet = pytest.importorskip("pyarrow.parquet")
    groups = []
    read_row_group = parquet.ParquetFile.read_row_group

    def counted(self, group):
        groups.append(group)
        return read_row_group(self, group)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    source = open_source(folder / "a.parquet")
    assert answers(source) == [f"a{number}" for number in range(12)]
    assert groups == list(range(6))
    for index in (11, 0, 10, 1, 11):
        assert source[index].messages[-1]["content"] == f"a{index}"
    assert groups[6:] == [0]  # the others were among the last four
    monkeypatch.setattr("vl2jax.data.parquet_file.CACHED_BYTES", 1)
    assert [source[index].where[-2:] for index in (4, 5, 6, 4)] == [" 5", " 6", " 7", " 5"]
    assert groups[7:] == [2, 3, 2]  # one group at least is kept


def test_parquet_that_pyarrow_cannot_decode(folder):
    """Bytes of a text that are no UTF-8, and groups with other numbers of rows."""
    write_parquet(folder / "a.parquet", [{"text": f"no such text {n}"} for n in range(4)])
    content = (folder / "a.parquet").read_bytes()
    failed = 0
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 0xC3
        (folder / "b.parquet").write_bytes(changed)
        try:
            source = open_source(folder / "b.parquet")
            for index in range(min(len(source), 9)):
                source[index]
        except UserError as error:
            failed += 1
            assert "b.parquet" in str(error) and len(str(error)) < 600
    assert failed > 10


IN_FILES = sorted({*WRITERS} - {"rows.json"})  # rows of a list are in memory


@pytest.mark.parametrize("five", IN_FILES, indirect=True)
def test_a_file_that_disappears_is_a_malformed_row(five, folder):
    for path in folder.iterdir():
        path.unlink()
    for read in (lambda: five[3], lambda: five.value(3)):
        with pytest.raises(UserError) as error:
            for _ in range(2):
                read()
    assert five.path.name in str(error.value) or "No such file" in str(error.value)
