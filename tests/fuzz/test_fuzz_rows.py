"""Fuzz target: rows of any form, and files of rows, are read or refused in one short line."""

import bz2
import gzip
import json
import lzma
import pickle

import hypothesis.strategies as st
import PIL.Image
import pytest
from fuzz_case import fuzz, mutated

from vl2jax.common.errors import UserError
from vl2jax.data import keys
from vl2jax.data.files import open_rows, open_source
from vl2jax.data.formats import read_question, read_row
from vl2jax.data.samples import read_sample
from vl2jax.inference.request import read_question_at
from vl2jax.processing.limits import Limits, TooLong
from vl2jax.processing.prompt import LOSS_KEYS

TEXTS = [
    *(
        "",
        " ",
        "no see",
        "<image>",
        "<image>\nsee",
        "<image_1>",
        "<|image_pad|>",
        "<video>",
        "[IMG]",
    ),
    *(
        "<bbox>",
        "<ref-object>",
        "<img>a.png</img>",
        "a.png",
        "gone.png",
        "data:image/png;base64,AAAA",
    ),
    *(
        "data:",
        "file://",
        "https://a/b.png",
        "gs://a/b",
        "~",
        "~nobody/x",
        "a\0b",
        "x" * 300,
        "\ud83d",
    ),
    *("user", "assistant", "human", "gpt", "system", "tool", "real", "norm1", "text", "image"),
    *("image_url", "AAAA" * 99, "\n\r\x1b[31m", "\u202e", "<|User|>", "<｜end▁of▁sentence｜>"),
]
NUMBERS = st.integers(-3, 200) | st.floats() | st.sampled_from([2**63, -(2**70), 1e308])
LEAVES = st.none() | st.booleans() | NUMBERS | st.sampled_from(TEXTS) | st.text(max_size=9)
KEYS = [
    *(*keys.ROW_KEYS, *keys.SYSTEM_KEYS, *keys.IMAGE_KEYS, *keys.ROLE_KEYS, *keys.CONTENT_KEYS),
    *(*LOSS_KEYS, "objects", "ref", "bbox", "bbox_type", "image_id", "type", "url", "image_url"),
    *(
        "bytes",
        "path",
        "base64",
        "source",
        "user",
        "video",
        "videos",
        "rejected",
        "tool_calls",
        "id",
    ),
]
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=24,
)
ROLES = st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool", "User"])
IMAGES = st.sampled_from(["a.png", {"path": "a.png"}, {"bytes": "AAAA"}, None, ""]) | ANYTHING
PARTS = st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, st.sampled_from(TEXTS))
    | st.builds(lambda image: {"type": "image", "image": image}, IMAGES)
    | ANYTHING,
    max_size=3,
)
TURNS = st.lists(
    st.builds(
        lambda role, content, more: {"role": role, "content": content} | more,
        ROLES,
        st.sampled_from(TEXTS) | PARTS | ANYTHING,
        st.dictionaries(st.sampled_from([*LOSS_KEYS, "images", "name"]), ANYTHING, max_size=1),
    ),
    max_size=4,
)
TALKS = st.builds(
    lambda asked, answer, images, more: (
        {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ],
            "images": images,
        }
        | more
    ),
    st.sampled_from(TEXTS) | st.text(max_size=20),
    st.sampled_from(TEXTS) | st.text(max_size=20),
    st.lists(IMAGES, max_size=2),
    st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=2),
)
OBJECTS = st.builds(
    lambda boxes, kinds, refs: (
        {"bbox": boxes, "ref": refs} | ({} if kinds is None else {"bbox_type": kinds})
    ),
    st.lists(st.lists(NUMBERS, max_size=5) | ANYTHING, max_size=3),
    st.none() | st.sampled_from(["real", "norm1000", "norm1", ["real"]]) | ANYTHING,
    st.lists(LEAVES, max_size=2),
)
GROUNDED = st.builds(lambda row, objects: row | {"objects": objects}, TALKS, OBJECTS)
ROWS = TALKS | GROUNDED | st.builds(lambda turns: {"messages": turns}, TURNS) | TURNS | ANYTHING


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    PIL.Image.new("RGB", (60, 40)).save(folder / "a.png")
    return folder


def refuse(tokens, tiles):
    if tokens > 40 or tiles > 4:
        raise TooLong("too long")


def first_failure(works):
    """Calls all functions; raises the first UserError of one of them."""
    failures = []
    for work in works:
        try:
            work()
        except UserError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def test_rows(processor, root):
    cut = Limits(40, 4, True, refuse)

    def read(row):
        before = pickle.dumps(row)
        options = {"where": "", "folders": [root]}
        first_failure(
            [
                lambda: read_sample(read_row(row, where="a:1", root=root), processor),
                lambda: read_sample(read_row(row, where="a:1", root=root), processor, limits=cut),
                lambda: read_question(row, **options),
                lambda: read_question(row, keep_answer=True, **options),
            ]
        )
        assert pickle.dumps(row) == before  # a row is not changed

    assert fuzz(ROWS, read)


def containers():
    """Whole files of rows in all containers, encodings and compressions."""
    rows = [
        {"id": 1, "image": "a.png", "messages": [{"role": "user", "content": "<image>see"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"text": "see no 图片"},
    ]
    texts = [json.dumps(rows), json.dumps({"data": rows}, indent=1), json.dumps(rows[0], indent=2)]
    texts += ["\n".join(map(json.dumps, rows)), "\n\n" + json.dumps(rows[1]) + "\r\n", "[1, 2]"]
    files = [text.encode(code) for text in texts for code in ("utf-8", "utf-8-sig", "utf-16")]
    files += [pack(texts[3].encode()) for pack in (gzip.compress, bz2.compress, lzma.compress)]
    zstandard = pytest.importorskip("zstandard")
    return [*files, zstandard.compress(texts[3].encode()), b"", b"\n"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_files_of_rows(root, name):
    def read(content):
        (root / name).write_bytes(content)
        rows, asked = open_source(root / name), open_rows(root / name)
        indices = range(min(len(rows), 20))
        first_failure(
            [lambda i=i: rows[i] for i in indices]
            + [lambda i=i: read_question_at(asked, i) for i in indices]
        )

    assert fuzz(mutated(containers()), read)
