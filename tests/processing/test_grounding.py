"""Tests of grounding: boxes are parsed as in the original or rejected with a reason; drawing."""

import json

import numpy as np
import PIL.Image
import pytest

from vl2jax.processing import grounding
from vl2jax.processing.grounding import Box, parse


def one(boxes):
    return f"<|ref|>cat<|/ref|><|det|>{boxes}<|/det|>"


@pytest.fixture(scope="module")
def cases(data_dir):
    return json.loads((data_dir / "grounding.json").read_text())


def test_goldens(cases):
    assert len(cases) == 270
    for case in cases:
        found = parse(case["response"], case["size"])
        if case["result"] is None:
            assert found.boxes == () and found.refused, case
            continue
        assert found.refused == (), case
        assert [[box.label, list(box.xyxy)] for box in found.boxes] == case["result"], case
        assert bool(found.notes) == (case["result"] == []), case
        colours = [list(grounding.COLOURS[i % 13]) for i in range(len(found.boxes))]
        assert colours == case["colors"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a dog", "no <|ref|>"),
        ("<|ref|>cut o", "no complete pair"),
        ("<|ref|>a<|/ref|>", "1 labels <|ref|>..<|/ref|> but 0 lists"),
        (one("[[1, 2, 3]]"), "'[1, 2, 3]' of 'cat': a box needs four numbers, got 3"),
        (one("[[]]"), "'[]' of 'cat': a box needs four numbers, got 0"),
        (one("[[a, 2, 3, 4]]"), "'a' is not a decimal number"),
        (one("[[01, 2, 3, 4]]"), "'01' is not a decimal number"),
        (one("[[1, , 3, 4]]"), "'' is not a decimal number"),
        (one("[[9, 0, 1, 5]]"), "width or height is negative: (9, 0, 1, 5)"),
        (one("[[1e999, 2, 3, 4]]"), "a coordinate is infinite"),
        (one(f"[[{'9' * 400}, 2, 3, 4]]"), "a coordinate is infinite"),
        (one("[[__import__('os').getpid(), 2, 3, 4]]"), "is not a decimal number"),
        (one("[[9**9**9**9, 2, 3, 4]]"), "is not a decimal number"),
        (one("[[nan, 2, 3, 4]]"), "'nan' is not a decimal number"),
        (one("[[True, 2, 3, 4]]"), "'True' is not a decimal number"),
    ],
)
def test_refusals_name_the_reason(text, reason):
    found = parse(text, (999, 999))
    assert found.boxes == ()
    assert len(found.refused) == 1 and reason in found.refused[0]


def test_one_bad_box_refuses_all_and_every_reason_is_given():
    text = one("[[5, 5, 50, 50], [x], [1, 2, 3]]") + one("[[1, 1, 2, 2]]")
    found = parse(text, (640, 480))
    assert found.boxes == () and len(found.refused) == 2


def test_a_label_without_a_box_is_noted_but_refuses_nothing():
    found = parse(one("[[5, 5, 50, 50]]") + one("none"), (640, 480))
    assert found.boxes == (Box("cat", (3, 2, 32, 24)),)
    assert found.refused == () and "within the outer brackets of 'none'" in found.notes[0]


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ("[[0, 0, 999, 999]]", (0, 0, 640, 480)),
        ("[[1.5, .5, 3e2, 999.]]", (0, 0, 192, 480)),
        ("[[-5, -10, 300, 400]]", (-3, -4, 192, 192)),
        ("[[+1,2,3,4,]]", (0, 0, 1, 1)),
        ("[[1, 2, 300, 400, 5]]", (0, 0, 192, 192)),
        ("[[00, 0, 12000, 999]]", (0, 0, 7687, 480)),
    ],
)
def test_accepted_oddities(boxes, expected):
    assert parse(one(boxes), (640, 480)).boxes == (Box("cat", expected),)


def test_drawing_colours_the_edges_of_a_box():
    picture = PIL.Image.new("RGB", (200, 160))
    boxes = [Box("", (20, 40, 100, 120)), Box("", (150, 40, 190, 60))]
    drawn = np.asarray(grounding.draw(picture, boxes))
    assert not np.asarray(picture).any()  # the caller's image is unchanged
    assert (drawn[40:43, 20:101] == (255, 0, 0)).all()
    assert (drawn[40:121, 98:101] == (255, 0, 0)).all()
    assert not drawn[43:118, 23:98].any() and not drawn[:40].any()
    assert (drawn[60, 150:191] == (0, 255, 0)).all()


def test_a_box_outside_is_drawn_at_the_edge():
    drawn = np.asarray(grounding.draw(PIL.Image.new("RGB", (50, 40)), [Box("", (-9, -9, 99, 99))]))
    assert (drawn[0] == (255, 0, 0)).all() and (drawn[:, 49] == (255, 0, 0)).all()
    assert not drawn[3:37, 3:47].any()


@pytest.mark.parametrize(
    ("box", "corner"),
    [
        ((100, 80, 150, 120), (100, 60)),  # above
        ((100, 5, 150, 120), (100, 5)),  # inside, because there is no room above
        ((180, 80, 199, 120), (140, 60)),  # moved to the left
        ((199, 149, 199, 149), (140, 129)),
    ],
)
def test_places_of_a_label(box, corner):
    assert grounding.place_label(box, (60, 20), (200, 150)) == corner


def test_a_label_is_written_above_its_box():
    drawn = np.asarray(
        grounding.draw(PIL.Image.new("RGB", (300, 200)), [Box("cat", (50, 100, 250, 190))])
    )
    rows, columns = np.nonzero(drawn[:100].any(axis=-1))
    assert columns.min() == 50 and rows.max() == 99 and rows.min() > 60
    label = drawn[rows.min() : 100, 50 : columns.max() + 1]
    assert (label == (255, 0, 0)).all(axis=-1).mean() > 0.5  # the background
    assert (label == (255, 255, 255)).all(axis=-1).any()  # the letters


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (2, 300), (300, 2), (40, 40)])
def test_a_label_never_leaves_a_small_picture(size):
    label = grounding.render_label("a label that is longer than the picture", (255, 0, 0), size)
    assert label.width <= size[0] and label.height <= size[1]
    x, y = grounding.place_label((size[0] - 1, size[1] - 1, 0, 0), label.size, size)
    assert x >= 0 and x + label.width <= size[0] and y >= 0 and y + label.height <= size[1]
    boxes = [Box("a label that is longer than the picture", (0, 0, *size))]
    assert grounding.draw(PIL.Image.new("RGB", size), boxes).size == size


def test_a_long_label_shrinks_before_it_is_cut():
    short = grounding.render_label("label", (255, 0, 0), (600, 400))
    shrunk = grounding.render_label("label " * 10, (255, 0, 0), (400, 400))
    assert shrunk.width <= 400 and shrunk.height < short.height


@pytest.mark.parametrize(
    ("label", "written"),
    [
        ("cat", "cat"),
        ("狗", "U+72D7"),
        ("two 狗猫 dogs", "two U+72D7 U+732B dogs"),
        ("line\nbreak\tand\0", "line break and U+0000"),
        ("\ud800", "U+D800"),
        ("  ", ""),
    ],
)
def test_characters_without_a_glyph_are_spelled(monkeypatch, label, written):
    monkeypatch.setattr(grounding, "_system", lambda size: ())
    text, _ = grounding.fit_text(label, 20)
    assert text == written
    picture = grounding.draw(PIL.Image.new("RGB", (300, 100)), [Box(label, (5, 40, 290, 90))])
    assert np.asarray(picture)[:38].any() == bool(written)


def test_a_font_with_the_glyphs_is_preferred(monkeypatch):
    built_in, other = grounding._built_in(20), grounding._built_in(19)
    lacks = {built_in: {"狗", "猫"}, other: {"猫"}}
    monkeypatch.setattr(grounding, "_has_glyph", lambda char, font: char not in lacks[font])
    monkeypatch.setattr(grounding, "_system", lambda size: (other,))
    assert grounding.fit_text("狗猫", 20) == ("狗 U+732B", other)
    assert grounding.fit_text("cat", 20) == ("cat", built_in)
