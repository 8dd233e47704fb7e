"""Scoring: literal answers with known scores."""

import dataclasses
import math

import pytest

from vl2jax.common.errors import UserError
from vl2jax.evaluation import scoring
from vl2jax.evaluation.scoring import Score, aggregate, answered_boxes, iou, match_boxes, score
from vl2jax.synthetic import FAMILIES, question


@dataclasses.dataclass(frozen=True)
class Asked:
    answer: str
    kind: str = "text"
    boxes: tuple = ()


def tagged(*boxes, label="red circle"):
    return f"<|ref|>{label}<|/ref|><|det|>{[list(box) for box in boxes]}<|/det|>"


def place(*boxes):
    return Asked(tagged(*boxes), "box", boxes)


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("red", "red", True),
        ("red", "  Red.\n", True),
        ("red", "red .", True),
        ("3", "３", True),
        ("红色", "红色。", True),
        ("a red circle", "a  red\tcircle", True),
        ("red", "dark red", False),
        ("red", "", False),
        ("3", "3.5", False),
        ("3", "three", False),
        ("image_2", "image_3", False),
        ("red", "red, I think", False),
    ],
)
def test_exact_match(expected, text, right):
    assert score(Asked(expected), text) == Score(correct=right, exact=right)


def test_normalised_texts():
    assert scoring.normalise(" Ｔｈｅ  END . ") == "the end"
    assert scoring.normalise("...") == ".."
    assert scoring.normalise("") == ""


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5),
        ((0, 0, 10, 10), (2, 2, 7, 6), 0.2),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((0, 0, 10, 10), (4, 4, 4, 4), 0.0),
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0),
        ((0, 0, 999, 999), (-1e308, -1e308, 1e308, 1e308), 0.0),
    ],
)
def test_iou(a, b, expected):
    assert iou(a, b) == pytest.approx(expected, abs=1e-15)
    assert iou(b, a) == iou(a, b)


def test_every_coordinate_is_read_exactly():
    for start in range(0, 1000, 4):
        box = (start, start + 1, start + 2, start + 3)
        assert answered_boxes(tagged(box)) == (box,)
    assert answered_boxes(tagged((0, 0.125, 10.5, 999))) == ((0, 0.125, 10.5, 999),)
    assert answered_boxes(tagged((-60, 0, 1200, 5))) == ((-60, 0, 1200, 5),)


def test_a_malformed_answer_has_no_boxes():
    for text in ("", "none", tagged((1, 2, 3)), tagged((9, 9, 1, 1)), tagged((1, 1, 5, 5))[:-8]):
        assert answered_boxes(text) == ()
        assert score(place((1, 1, 5, 5)), text).iou == 0


@pytest.mark.parametrize(
    ("shift", "expected", "right"),
    [(0, 1.0, True), (20, 2 / 3, True), (33, 67 / 133, True), (34, 66 / 134, False)],
)
def test_a_shifted_box(shift, expected, right):
    """A box of width 100, shifted by d, has an IoU of (100 - d) / (100 + d)."""
    found = score(place((100, 200, 200, 400)), tagged((100 + shift, 200, 200 + shift, 400)))
    assert found == Score(right, shift == 0, iou=pytest.approx(expected), acc50=right)


def test_an_iou_of_one_half_is_right():
    found = score(place((0, 0, 100, 100)), tagged((0, 0, 100, 50)))
    assert (found.iou, found.acc50) == (0.5, True)


def test_the_label_does_not_count_for_boxes():
    found = score(place((0, 0, 9, 9)), tagged((0, 0, 9, 9), label="blue star"))
    assert found == Score(True, False, iou=1.0, acc50=True)


A, B, C = (0, 0, 100, 100), (200, 0, 300, 100), (400, 0, 500, 100)


@pytest.mark.parametrize(
    ("answered", "expected", "right"),
    [
        ((A, B), 1.0, True),
        ((B, A), 1.0, True),
        ((A,), 0.5, False),
        ((A, A), 0.5, False),
        ((A, B, C), 2 / 3, False),
        ((C,), 0.0, False),
        ((A, (200, 0, 300, 60)), 0.8, True),
        ((A, (200, 0, 300, 40)), 0.7, False),
        ((), 0.0, False),
    ],
)
def test_several_boxes(answered, expected, right):
    found = score(place(A, B), tagged(*answered))
    assert found.iou == pytest.approx(expected)
    assert (found.acc50, found.correct) == (right, right)


def test_boxes_in_several_tags_count_together():
    text = f"A {tagged(A)} and a {tagged(B, label='blue star')}"
    assert score(place(A, B), text).iou == 1.0


def test_the_best_pair_is_made_first():
    near, nearer = (0, 0, 100, 80), (0, 0, 100, 90)
    assert match_boxes([A], [near, nearer]) == [0.9]
    assert match_boxes([A, nearer], [A, near]) == pytest.approx([1.0, 8 / 9])
    assert match_boxes([A, B], []) == [0.0, 0.0]
    assert match_boxes([], [A]) == []


REFUSAL = Asked("There is no red circle in the image.", "absent")


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("There is no red circle in the image.", True),
        ("there is no red circle in the image", True),
        ("There is no blue circle in the image.", False),
        (tagged(A), False),
        (f"There is no red circle in the image. {tagged(A)}", False),
        ("There is a red circle in the image.", False),
        ("no", False),
        ("", False),
    ],
)
def test_refusal(text, refused):
    assert score(REFUSAL, text) == Score(refused, refused, refused=refused)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["heldout", "combinations"])
def test_the_expected_answer_is_right(family, split):
    for index in range(20):
        asked = question(family, index, split)
        found = score(asked, asked.answer)
        assert found.correct and found.exact
        assert found.iou == (1.0 if asked.kind == "box" else None)
        assert found.refused == (True if asked.kind == "absent" else None)
        assert not score(asked, "").correct
        assert not score(asked, asked.answer + " x y").exact


def test_aggregate():
    found = aggregate([Score(True, False, iou=1.0, acc50=True), Score(False, False, 0.25, False)])
    assert found == {
        "questions": 2,
        "correct": 0.5,
        "exact_match": 0.0,
        "acc50": 0.5,
        "mean_iou": 0.625,
        "refused": None,
    }
    assert aggregate([Score(True, True)] * 3 + [Score(False, False)])["exact_match"] == 0.75
    assert aggregate([])["correct"] is None


def test_summary():
    yes, no = Score(True, True), Score(False, False)
    scores = {
        "digit": [yes, yes, yes],
        "colour": [no],
        "word": [no, no],
        "grounding": [Score(True, False, 0.75, True), Score(False, False, 0.25, False)],
        "absent": [],
    }
    assert scoring.DATASETS["synthetic"].summarise(scores) == {
        "exact_match": {"value": 0.75, "questions": 4, "families": ["colour", "digit"]},
        "acc50": {"value": 0.5, "questions": 2, "families": ["grounding"]},
    }


def test_the_summary_names_families_that_there_are():
    dataset = scoring.DATASETS["synthetic"]
    assert {name for names in dataset.summary.values() for name in names} <= {*dataset.families}
    assert dataset.splits[0] == "heldout"
    assert sorted(dataset.splits) == ["combinations", "heldout", "train"]


def test_unknown_names():
    dataset = scoring.find_dataset("synthetic")
    assert dataset.check_families(["shape", "colour", "shape"]) == ["shape", "colour"]
    with pytest.raises(UserError, match=r"no data 'refcoco'; there is synthetic$"):
        scoring.find_dataset("refcoco")
    with pytest.raises(UserError, match=r"no split 'test'; there are heldout, "):
        dataset.check_split("test")
    with pytest.raises(UserError, match=r"no family 'color'; there are colour, shape, "):
        dataset.check_families(["colour", "color"])
    with pytest.raises(UserError, match="no family is named"):
        dataset.check_families([])


def test_scores_are_numbers_whatever_is_answered():
    huge = "9" * 400
    for numbers in (
        f"0, 0, {huge}, {huge}",
        f"-1e300, -{huge[:300]}, 1e300, 5",
        "1e308, 0, 1e308, 5",
    ):
        found = score(place(A), f"<|ref|>x<|/ref|><|det|>[[{numbers}]]<|/det|>")
        assert math.isfinite(found.iou) and found.iou < 0.5
