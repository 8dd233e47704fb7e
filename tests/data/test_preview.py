"""Tests of the preview: text of packed samples with supervised runs marked, and their tiles."""

import io
import re

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError
from vl2jax.common.json_file import read_object
from vl2jax.config import VL2Config
from vl2jax.data.packing import BatchShape
from vl2jax.data.pipeline import make_pipeline
from vl2jax.data.preview import preview
from vl2jax.data.row import Row
from vl2jax.processing.processor import Processor

SHAPE = BatchShape(pools=1, rows=2, length=120, tiles=12, segments=4)


@pytest.fixture(scope="module")
def processor(data_dir):
    path = data_dir / "mini-small"
    return Processor.from_dir(path, VL2Config.from_hf(read_object(path / "config.json")))


def chat(question, answer, where, images=()):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row(messages=turns, images=images, where=where)


ROWS = [
    chat(
        "<image>\nWhich colour?",
        "Red 红.",
        "a.jsonl:1",
        [PIL.Image.new("RGB", (110, 55), (255, 0, 0))],
    ),
    chat("Hi", "Hello", "a.jsonl:2"),
    chat(
        "<image><image>Same?",
        "No.",
        "b.json:7",
        [PIL.Image.new("RGB", (50, 50), (0, 255, 0)), PIL.Image.new("RGB", (50, 50), (0, 0, 255))],
    ),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(processor, rows, folder, count, stream, shape=SHAPE, **options):
    options = {"mask_prompt": True, "seed": 0, "shuffle": False, "repeat": False} | options
    batches = iter(make_pipeline([(rows, 1.0)], processor, shape, **options))
    return preview(batches, processor, folder, count, stream)


def test_text(processor, tmp_path):
    stream = io.StringIO()
    blocks = run(processor, ROWS, tmp_path, 9, stream)
    assert len(blocks) == 3 and all(block in stream.getvalue() for block in blocks)
    titles, texts = zip(*(block.split("\n", 1) for block in blocks), strict=True)
    by_name = dict(zip((re.search(r"\S+:\d", t)[0] for t in titles), texts, strict=True))
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    assert by_name["a.jsonl:1"] == (
        f"{bos}<|User|>: <image: 17 tokens, 3 tiles>\n"
        f"Which colour?\n\n<|Assistant|>:⟦Red 红.{eos}⟧\n"
    )
    assert by_name["a.jsonl:2"] == f"{bos}<|User|>: Hi\n\n<|Assistant|>:⟦Hello{eos}⟧\n"
    text = by_name["b.json:7"]
    assert "<2 images: " in text and text.endswith(f"⟦No.{eos}⟧\n")


def test_titles_say_where(processor, tmp_path):
    titles = [block.split("\n")[0] for block in run(processor, ROWS[1:2], tmp_path, 1, Terminal())]
    tokens = len(processor.sample(ROWS[1].messages, inference=False, mask_prompt=True))
    assert titles == [
        "sample 1: a.jsonl:2 (number 0), batch 1 pool 0 row 0 segment 1"
        f" columns 0..{tokens - 1}, {tokens} tokens, 5 supervised, 0 tiles"
    ]


def test_colour_on_a_terminal(processor, tmp_path):
    stream = Terminal()
    (block,) = run(processor, ROWS[1:2], tmp_path, 1, stream)
    assert "\x1b[4;32mHello<｜end▁of▁sentence｜>\x1b[0m" in block and "⟦" not in block
    assert "these samples have no pictures" in stream.getvalue()
    assert not (tmp_path / "preview.png").exists()


def test_a_document_is_supervised_after_its_first_token(processor, tmp_path):
    rows = [Row(text="Once upon", where="d:1")]
    (block,) = run(processor, rows, tmp_path, 1, io.StringIO())
    text = block.split("\n", 1)[1]
    assert text == "<｜begin▁of▁sentence｜>⟦Once upon<｜end▁of▁sentence｜>⟧\n"


def test_picture(processor, tmp_path):
    stream = io.StringIO()
    blocks = run(processor, ROWS, tmp_path / "new", 9, stream)
    path = tmp_path / "new" / "preview.png"
    tiles = sum(int(re.search(r"(\d+) tiles\n", block)[1]) for block in blocks)
    assert f"{tiles} tiles: {path}" in stream.getvalue()
    with PIL.Image.open(path) as sheet:
        lines = -(-tiles // 8)
        assert sheet.size == (min(tiles, 8) * 118 + 6, lines * 132 + 6)
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255), (208, 208, 208)} <= colours
    assert any(max(colour) < 60 for colour in colours)  # labels


def test_only_so_many_are_shown(processor, tmp_path):
    stream = io.StringIO()
    blocks = run(processor, ROWS, tmp_path, 4, stream, repeat=True, shuffle=True)
    assert [block.split(":")[0] for block in blocks] == [f"sample {i}" for i in (1, 2, 3, 4)]
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*config\.batch\.length"):
        short = BatchShape(pools=1, rows=1, length=9, tiles=3, segments=1)
        run(processor, ROWS, tmp_path, 1, stream, shape=short)
