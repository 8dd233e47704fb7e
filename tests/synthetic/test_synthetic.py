"""Tests of synthetic data: it is deterministic, answers are correct, held-out pairs are absent."""

import concurrent.futures
import dataclasses
import itertools
import json
import re

import numpy as np
import PIL.Image
import pytest

from convert import random_hf
from vl2jax.common.errors import UserError
from vl2jax.processing import grounding
from vl2jax.processing.processor import Processor
from vl2jax.synthetic import FAMILIES, HELD_OUT, Synthetic, paint, question, source, tokens
from vl2jax.synthetic.__main__ import main
from vl2jax.synthetic.families_pictures import Chart
from vl2jax.synthetic.phrases import PHRASES
from vl2jax.synthetic.scene import SIZES, Scene
from vl2jax.synthetic.words import COLOURS, OPPOSITES, SHAPES, SHORT_WORDS, WORDS

ROWS = 1500
BOXED = {"grounding": "box", "grounded_caption": "box", "in_context": "box", "absent": "absent"}
SINGULAR = {"crosses": "cross", **{f"{name}s": name for name in (*SHAPES, "shape", "digit", "bar")}}


@pytest.fixture(scope="module")
def conversations():
    """(situation, turns) of `ROWS` training rows."""
    source = Synthetic("train", 0)
    return [source.conversation(index) for index in range(ROWS)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.make_tokenizer()


def scenes_of(conversations):
    scenes = itertools.chain.from_iterable(situation.scenes for situation, _ in conversations)
    return [scene for scene in scenes if isinstance(scene, Scene)]


def ink_box(scene: Scene) -> tuple[int, int, int, int]:
    """The bounding box of all pixels that are not background."""
    inked = (np.asarray(scene.paint()) != scene.background).any(-1)
    rows, columns = inked.any(1).nonzero()[0], inked.any(0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def test_a_row_depends_on_split_seed_and_number_alone():
    source, again = Synthetic("train", 3), Synthetic("train", 3)
    forward = [source[index] for index in range(20)]
    for index in reversed(range(20)):
        row = again[index]
        assert row.messages == forward[index].messages
        assert [image.tobytes() for image in row.images] == [
            image.tobytes() for image in forward[index].images
        ]
    assert forward[0].where == "synthetic train row 0"
    for other in (Synthetic("train", 4), Synthetic("heldout", 3), Synthetic("combinations", 3)):
        assert sum(other[i].messages == forward[i].messages for i in range(20)) <= 2


def test_rows_have_these_literal_words():
    def first(family):
        asked = question(family, 0)
        return asked.row.messages[0]["content"], asked.answer, asked.kind

    assert first("text") == ("Add 9 and 4.", "13", "text")
    assert first("colour") == ("<image>\n请说出十字形的颜色。", "黑色", "text")
    asked = "<image>\nLocate <|ref|>the red circle<|/ref|> in the given image."
    assert first("absent") == (asked, "There is no red circle in the image.", "absent")
    assert first("three_images")[1] == "image_3"
    assert question("count", 1).row.where == "synthetic heldout count 1"


def test_lessons_begin_with_answers_of_one_word(monkeypatch):
    rows = (100, 40)
    short = [lesson._replace(rows=n) for lesson, n in zip(source.LESSONS, rows, strict=True)]
    monkeypatch.setattr(source, "LESSONS", short)
    plain, taught = Synthetic("train", 2), Synthetic("train", 2, lessons=True)
    assert taught.ordered
    assert not plain.ordered
    for index in range(100):
        situation, turns = taught.conversation(index)
        assert len(situation.scenes) == 1
        for turn in turns:
            assert re.fullmatch(r"[a-z]+|\d|[一-鿿]+", turn.answer)
    boxed = [turn.boxes for i in range(100, 140) for turn in taught.conversation(i)[1]]
    assert 10 < sum(map(bool, boxed)) < len(boxed)
    for index in range(140, 180):
        assert taught.conversation(index) == plain.conversation(index)
    other = Synthetic("train", 2, families=["word"], lessons=True)  # no lesson has this family
    assert other.conversation(0) == Synthetic("train", 2, families=["word"]).conversation(0)


def test_shapes_have_boxes_of_their_side_and_a_line_around_them():
    for shape, side in itertools.product(SHAPES, (16, 21, 27)):
        outer, inner = paint.shape_mask(shape, side), paint.inner_mask(shape, side)
        assert outer.size == inner.size == (side, side)
        outer, inner = (np.asarray(mask).astype(int) for mask in (outer, inner))
        assert (inner <= outer).all()
        assert inner[side // 2, side // 2] == 255
        assert max(inner[0].max(), inner[-1].max(), inner[:, 0].max(), inner[:, -1].max()) == 0
        assert 0.25 < inner.sum() / outer.sum() < 0.95


def test_threads_see_the_same_rows():
    source = Synthetic("train", 1)
    alone = [source[index].images[:1] for index in range(60)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda index: source[index].images[:1], range(60)))
    for first, second in zip(alone, together, strict=True):
        assert [image.tobytes() for image in first] == [image.tobytes() for image in second]


def test_boxes_are_tight_around_the_pixels(conversations):
    checked = 0
    for scene in scenes_of(conversations[:300]):
        for thing in scene.things:
            alone = Scene(scene.size, scene.background, (thing,))
            assert ink_box(alone) == thing.box
            checked += 1
        if scene.writing:
            assert ink_box(Scene(scene.size, scene.background, (), scene.writing)) == (
                scene.writing.box
            )
    assert checked > 400


def test_things_keep_apart_and_inside_what_the_model_sees(conversations):
    for scene in scenes_of(conversations):
        boxes = [thing.box for thing in scene.things]
        boxes += [scene.writing.box] if scene.writing else []
        for (a, b, c, d), (x, y, z, w) in itertools.combinations(boxes, 2):
            assert c <= x or z <= a or d <= y or w <= b
        for box in boxes:
            assert min(box) >= 0
            assert box[2] <= scene.size[0] * 70 / 76 + 1
            assert box[3] <= scene.size[1] * 70 / 76 + 1
        assert len(scene.things) <= 4


def test_shapes_have_their_colour_and_a_fair_size(conversations):
    for scene in scenes_of(conversations[:200]):
        pixels = np.asarray(scene.paint()).astype(int)
        for thing in scene.things:
            x, y = round(thing.centre(0)), round(thing.centre(1))
            distance = {
                name: np.abs(pixels[y, x] - rgb).sum() for name, (_, rgb) in COLOURS.items()
            }
            assert min(distance, key=distance.get) == thing.colour
            share = max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1])
            assert 0.15 < share / min(scene.size) < 0.5


def english(conversations):
    for situation, turns in conversations:
        if len(situation.scenes) == 1 and isinstance(situation.scene, Scene):
            yield from ((situation.scene, turn) for turn in turns if turn.question.isascii())


def test_counts_colours_and_shapes_are_true(conversations):
    seen = {"count": 0, "colour": 0, "shape": 0}
    for scene, turn in english(conversations):
        if turn.kind == "absent":
            continue
        things = [(thing.colour, thing.shape) for thing in scene.things]
        if found := re.match(
            r"(?:How many|Count(?: all)?(?: the)?) ([a-z ]+?)(?: are| do| in|\?)", turn.question
        ):
            words = [SINGULAR.get(word, word) for word in found[1].split()]
            if words[-1] in ("digit", "bar"):
                continue
            wanted = [pair for pair in things if all(w in (*pair, "shape") for w in words)]
            assert turn.answer == str(len(wanted)), turn
            seen["count"] += 1
        elif found := re.search(
            r"colou?r (?:is|of|does) (?:the )?(\w+)(?: have)?\?", turn.question
        ):
            shape = found[1] if found[1] != "the" else turn.question.split()[-1][:-1]
            assert [colour for colour, other in things if other == shape] == [turn.answer]
            seen["colour"] += 1
        elif turn.answer in SHAPES:
            (colour,) = set(re.findall(r"\w+", turn.question)) & set(COLOURS)
            assert [shape for other, shape in things if other == colour] == [turn.answer]
            seen["shape"] += 1
    assert min(seen.values()) > 100


def test_relations_comparisons_and_existence_are_true(conversations):
    seen, quarters = {"relation": 0, "compare": 0, "exists": 0, "quarter": 0}, set()
    pair = r"(\w+ \w+)"
    for scene, turn in english(conversations):
        named = {f"{thing.colour} {thing.shape}": thing.box for thing in scene.things}
        asked = turn.question
        if found := re.search(
            rf"[Tt]he {pair} (?:is )?(to the left of|to the right of|above|below) the {pair}", asked
        ):
            a, b = named[found[1]], named[found[3]]
            axis = 0 if "to the" in found[2] else 1
            before = a[axis] + a[axis + 2] < b[axis] + b[axis + 2]
            assert turn.answer == (
                "yes" if before == ("left" in found[2] or "above" in found[2]) else "no"
            )
            seen["relation"] += 1
        elif found := re.search(rf"the {pair} (?:and|or) the {pair}", asked):
            area = {
                name: (named[name][2] - named[name][0]) * (named[name][3] - named[name][1])
                for name in found.groups()
            }
            best = (max if "larger" in asked else min)(area, key=area.get)
            assert turn.answer == f"the {best}"
            assert max(area.values()) > 1.5 * min(area.values())
            seen["compare"] += 1
        elif found := re.search(rf"quarter (?:.* is|do you see|of) the {pair}", asked):
            if found[1] in named:
                x, y = (named[found[1]][i] + named[found[1]][i + 2] for i in (0, 1))
                side = "bottom" if y > scene.size[1] else "top"
                assert turn.answer == f"{side} {'right' if x > scene.size[0] else 'left'}"
                seen["quarter"] += 1
                quarters.add(turn.answer)
        elif found := re.search(rf"(?:there|see|show) an? {pair}", asked):
            assert turn.answer == ("yes" if found[1] in named else "no")
            seen["exists"] += 1
    assert min(seen.values()) > 15
    assert len(quarters) == 4


def test_what_is_absent_is_absent(conversations):
    checked = 0
    for scene, turn in english(conversations):
        if turn.kind != "absent":
            assert "There is no" not in turn.answer
            continue
        name = re.fullmatch(r"There is no ([a-z ]+) in the image\.", turn.answer)[1].split()
        for thing in scene.things:
            assert not all(word in (thing.colour, thing.shape, "shape") for word in name)
        assert not turn.boxes
        checked += 1
    assert checked > 200


def test_boxes_in_answers_are_those_of_the_things(conversations):
    checked = 0
    for situation, turns in conversations:
        for turn in turns:
            assert (turn.kind == "box") == bool(turn.boxes) == ("<|det|>" in turn.answer)
            if turn.kind != "box":
                continue
            scene = situation.scenes[turn.boxes_image]
            read = grounding.parse(turn.answer, scene.size)
            assert not read.refused
            assert len(read.boxes) == len(turn.boxes)
            numbers = [
                list(map(int, re.findall(r"\d+", part)))
                for part in re.findall(r"\[[\d, ]+\]", turn.answer)
            ]
            assert numbers == [list(box) for box in turn.boxes]
            for box in turn.boxes:
                pixels = [n / 999 * side for n, side in zip(box, scene.size * 2, strict=True)]
                assert any(
                    np.abs(np.subtract(pixels, thing.box)).max() < 0.5 for thing in scene.things
                )
                assert 0 <= min(box) <= max(box) <= 999
            checked += 1
    assert checked > 300


def test_all_of_a_kind_are_boxed(conversations):
    checked = 0
    for scene, turn in english(conversations):
        if found := re.search(r"<\|ref\|>all (\w+)( shapes)?<", turn.question):
            kind = found[1] if found[2] else found[1].removesuffix("s").replace("crosse", "cross")
            wanted = [t for t in scene.things if kind in (t.colour, t.shape)]
            assert len(turn.boxes) == len(wanted) >= 2
            checked += 1
    assert checked > 20


def test_writing_is_read_as_written(conversations):
    for index in range(40):
        asked = question("digit", index)
        assert re.fullmatch(r"\d", asked.answer)
        assert len(asked.row.images) == 1
        assert asked.row.messages[0]["content"].startswith("<image>\n")
    heights = [
        scene.writing.box[3] - scene.writing.box[1]
        for scene in scenes_of(conversations)
        if scene.writing and scene.writing.kind == "digit"
    ]
    assert min(heights) >= 20
    assert max(heights) > 40
    assert {question("word", index).answer for index in range(200)} & set(SHORT_WORDS)


def test_charts_say_what_they_show():
    checked = 0
    for situation, turns in map(Synthetic(families=["chart"]).conversation, range(60)):
        chart = situation.scene
        assert isinstance(chart, Chart)
        pixels = np.asarray(chart.paint()).astype(int)
        bars = {}
        for colour, value in chart.bars:
            column = (np.abs(pixels - COLOURS[colour][1]).sum(-1) == 0).sum(0).max()
            bars[colour] = (column, value)
        order = sorted(bars, key=lambda colour: bars[colour][0])
        assert order == sorted(bars, key=lambda colour: bars[colour][1])
        for turn in turns:
            if not turn.question.isascii():
                continue
            if "tallest" in turn.question or "shortest" in turn.question:
                assert turn.answer == order[-1 if "tallest" in turn.question else 0]
                checked += 1
            elif found := re.search(r"the (\w+) bar", turn.question):
                assert turn.answer == str(bars[found[1]][1])
                checked += 1
    assert checked > 50


def test_two_and_three_pictures():
    for family, count in (("in_context", 2), ("three_images", 3), ("text", 0), ("colour", 1)):
        asked = question(family, 0)
        assert len(asked.row.images) == count
        assert asked.row.messages[0]["content"].count("<image>") == count
        assert len(asked.row.messages) == 1
    for index in range(30):
        situation, turns = Synthetic(families=["three_images"]).conversation(index)
        for turn in turns:
            number = int(turn.answer[-1]) - 1
            if found := re.search(r"(\w+ \w+)[?.]$", turn.question):
                places = [bool(scene.find(*found[1].split())) for scene in situation.scenes]
                if any(places):
                    assert places == [n == number for n in range(3)]
    for index in range(30):
        situation, (turn,) = Synthetic(families=["in_context"]).conversation(index)
        first, second = situation.scenes
        assert len(second.find(*first.marked.pair)) == 1
        assert turn.boxes_image == 1


def test_held_out_pairs_are_never_trained_on(conversations):
    names = [f"{colour} {shape}" for colour, shape in HELD_OUT]
    names += [f"{COLOURS[colour][0]}的{SHAPES[shape]}" for colour, shape in HELD_OUT]
    texts = "\n".join(f"{t.question}\n{t.answer}" for _, turns in conversations for t in turns)
    assert not [name for name in names if name in texts]
    assert "red square" in texts
    for scene in scenes_of(conversations):
        assert not {thing.pair for thing in scene.things} & set(HELD_OUT)
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    for shape in SHAPES:
        assert sum(other == shape for _, other in HELD_OUT) <= len(COLOURS) // 3


def test_combinations_ask_about_held_out_pairs_only():
    for situation, _ in map(Synthetic("combinations").conversation, range(200)):
        for scene in situation.scenes:
            assert {thing.pair for thing in getattr(scene, "things", ())} <= set(HELD_OUT)
    held = Synthetic("heldout")
    seen = {
        thing.pair
        for scene in scenes_of([held.conversation(index) for index in range(400)])
        for thing in scene.things
    }
    assert len(seen) == 48


def test_every_family_language_and_phrasing_occurs(conversations):
    texts = [turn.question for _, turns in conversations for turn in turns]
    chinese = sum(not text.isascii() for text in texts) / len(texts)
    assert 0.15 < chinese < 0.35
    for key, (answer, *questions) in PHRASES.items():
        assert answer
        for language, phrasings in zip(("en", "zh"), questions, strict=True):
            assert len(set(phrasings)) >= 3, (key, language)
    assert len(FAMILIES) >= 14
    for family in FAMILIES:
        kinds = {question(family, index).kind for index in range(10)}
        assert kinds == {BOXED.get(family, "text")}, family


def test_rows_are_conversations(conversations):
    single = [len(turns) == 1 for situation, turns in conversations if len(situation.scenes) == 1]
    assert 0.15 < np.mean(single) < 0.45
    assert max(len(turns) for _, turns in conversations) == 8
    for _, turns in conversations:
        assert len({turn.question for turn in turns}) == len(turns)
    row = Synthetic()[0]
    roles = [message["role"] for message in row.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert ["<image>" in message["content"] for message in row.messages] == [True] + [False] * (
        len(roles) - 1
    )


def test_several_hundred_words():
    assert len(SHORT_WORDS) > 350
    assert len(set(WORDS.values())) == len(WORDS)
    assert all(word.isascii() and word.islower() for word in WORDS)
    assert all(not meaning.isascii() for meaning in WORDS.values())
    assert WORDS["cat"] == "猫"
    assert WORDS["clock"] == "时钟"
    flat = [word for pair in OPPOSITES for word in pair]
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(WORDS)
    written = {
        situation.scene.writing.text
        for situation, _ in map(Synthetic(families=["word"]).conversation, range(600))
    }
    assert len(written) > 250


def test_sizes_make_few_tiles(conversations):
    sizes = [scene.size for situation, _ in conversations for scene in situation.scenes]
    small = np.mean([max(size) <= 76 for size in sizes])
    assert 0.8 < small < 0.9
    assert {(152, 76), (76, 152)} <= set(sizes)
    assert set(SIZES) - {None} <= set(sizes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Synthetic("test"), "split is 'test'; choose one of train, heldout, combinations"),
        (lambda: Synthetic(seed=-1), "seed is -1"),
        (lambda: Synthetic()[-1], "index is -1"),
        (lambda: Synthetic(families=["color"]), "no family 'color'; there are colour, shape"),
        (lambda: question("color", 0), "no family 'color'"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_command_writes_llava_json(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--out", str(out), "-n", "80"]) == 0
    assert "wrote 80 rows" in capsys.readouterr().out
    entries = json.loads((out / "data.json").read_text(encoding="utf-8"))
    assert len(entries) == 80
    kinds = set()
    for entry, row in zip(entries, map(Synthetic().__getitem__, range(80)), strict=True):
        paths = entry.get("image", [])
        paths = [paths] if isinstance(paths, str) else paths
        kinds.add(type(entry.get("image")))
        assert "".join(turn["value"] for turn in entry["conversations"]).count("<image>") == len(
            paths
        )
        assert [turn["from"] for turn in entry["conversations"][:2]] == ["human", "gpt"]
        assert [turn["value"] for turn in entry["conversations"]] == [
            message["content"] for message in row.messages
        ]
        for path, image in zip(paths, row.images, strict=True):
            with PIL.Image.open(out / path) as saved:
                assert saved.convert("RGB").tobytes() == image.tobytes()
    assert kinds == {str, list, type(None)}
    assert main(["--out", str(out), "-n", "2", "--split", "heldout", "--seed", "9"]) == 0
    assert len(json.loads((out / "data.json").read_text(encoding="utf-8"))) == 2
    left = {path.name for path in (out / "images").iterdir()}
    assert all(name.startswith(("synthetic_000000_", "synthetic_000001_")) for name in left)


def test_the_command_spares_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: has notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (other / "images" / "cat.png").write_text("mine")
    (other / "data.json").write_text("[]")
    assert main(["--out", str(other)]) == 1
    assert (other / "data.json").read_text() == "[]"
    for arguments in (["--split", "dev"], ["-n", "0"], ["--seed", "-2"]):
        assert main(["--out", str(tmp_path / "new"), *arguments]) == 1
        assert capsys.readouterr().err.count("\n") >= 1
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_is_small_and_loses_nothing(conversations, tokenizer):
    assert tokenizer.get_vocab_size() <= tokens.VOCABULARY == 1536
    assert tokenizer.to_str() == tokens.make_tokenizer().to_str()
    for _, turns in conversations[:400]:
        for text in (text for turn in turns for text in (turn.question, turn.answer)):
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    for text in (*WORDS, *WORDS.values(), "naïve — ’quoted’ 🙂\t x"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert [tokenizer.id_to_token(i) for i in range(3)] == [tokens.BOS, tokens.EOS, tokens.PAD]
    assert tokenizer.id_to_token(1535) == "<|Assistant|>"


def test_common_words_and_digits_are_single_tokens(tokenizer):
    for text in (*COLOURS, *SHAPES, *(f" {name}" for name in (*COLOURS, *SHAPES)), "yes", "no"):
        assert len(tokenizer.encode(text).ids) == 1, text
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("[[12, 500, 999, 0]]").ids]
    assert pieces == ["[[", "1", "2", ", ", "5", "0", "0", ", ", "9", "9", "9", ", ", "0", "]]"]


def test_processor_files_make_a_processor(tmp_path):
    config = random_hf.demo_config()
    decoder = dataclasses.replace(config.decoder, vocab_size=tokens.VOCABULARY)
    config = dataclasses.replace(config, decoder=decoder)
    tokens.write_processor_files(tmp_path, config)
    processor = Processor.from_dir(tmp_path, config)
    for index in range(30):
        row = Synthetic()[index]
        sample = processor.sample(row.messages, row.images, inference=False, mask_prompt=True)
        assert len(sample.image_sizes) == len(row.images)
        text = processor.tokenizer.decode(sample.tokens[sample.loss_mask])
        answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
        assert text == tokens.BOS + "".join(answer + tokens.EOS for answer in answers)
