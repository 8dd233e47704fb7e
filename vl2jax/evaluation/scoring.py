"""Right or wrong: what an answer is worth, question by question and in all.

A text is right where it matches exactly, up to what `normalise` levels.  Boxes are right where
there are as many as expected, each over its own expected one with an IoU of 0.5 or more; their
labels do not count.  What is absent is refused by the expected sentence and nothing else.
"""

import dataclasses
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from vl2jax import synthetic
from vl2jax.common.errors import UserError
from vl2jax.processing import grounding
from vl2jax.synthetic.scene import ALLOWED

THRESHOLD = 0.5  # the IoU from which on a box is right
_FINE = 10**6  # pixels per unit, so that being whole numbers costs the parsed edges nothing

Rect = tuple[float, float, float, float]


class Asked(Protocol):
    """What scoring needs to know of a question; `synthetic.Question` is one.

    Attributes:
      answer: the expected text.
      kind: a name of `SCORERS`.
      boxes: expected x0, y0, x1, y1 from 0 to 999; empty unless kind is "box".
    """

    answer: str
    kind: str
    boxes: Sequence[tuple[int, int, int, int]]


@dataclasses.dataclass(frozen=True)
class Score:
    """What one answer is worth.

    Attributes:
      correct: by the measure of the question's kind.
      exact: whether the text matches exactly, whatever the kind.
      iou: of boxes, 0 to 1; None for other kinds.
      acc50: whether the boxes are right; None for other kinds.
      refused: whether it says that the thing is absent; None for other kinds.
    """

    correct: bool
    exact: bool
    iou: float | None = None
    acc50: bool | None = None
    refused: bool | None = None


def score(question: Asked, text: str) -> Score:
    """Scores an answer by the kind of its question.

    Args:
      question: what was asked, with what was expected.
      text: the answer with its grounding tokens, without the end token.
    """
    return SCORERS[question.kind](question, text)


def score_text(question: Asked, text: str) -> Score:
    """Right where the text matches exactly."""
    exact = matches(question.answer, text)
    return Score(exact, exact)


def score_boxes(question: Asked, text: str) -> Score:
    """Right where there are as many boxes as expected and each pair has `THRESHOLD` or more."""
    answered = answered_boxes(text)
    found = match_boxes(question.boxes, answered)
    count = max(len(question.boxes), len(answered))
    right = len(question.boxes) == len(answered) and all(iou >= THRESHOLD for iou in found)
    iou = sum(found) / count if count else 1.0
    return Score(right, matches(question.answer, text), iou=iou, acc50=right)


def score_absent(question: Asked, text: str) -> Score:
    """Right where the text is the expected refusal, and so has no box."""
    exact = matches(question.answer, text)
    refused = exact and not answered_boxes(text)
    return Score(refused, exact, refused=refused)


# Kind of a question -> what scores it.
SCORERS: Mapping[str, Callable[[Asked, str], Score]] = {
    "text": score_text,
    "box": score_boxes,
    "absent": score_absent,
}


def matches(expected: str, text: str) -> bool:
    """Whether two texts are the same once normalised."""
    return normalise(expected) == normalise(text)


def normalise(text: str) -> str:
    """Levels what does not count: width of characters, case, white space, the last full stop."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


def answered_boxes(text: str) -> tuple[Rect, ...]:
    """Boxes of an answer as it wrote them, from 0 to 999 where they lie in the picture.

    Empty if anything about them is malformed; see `grounding.parse`.
    """
    side = grounding.SCALE * _FINE
    boxes = grounding.parse(text, (side, side)).boxes
    return tuple(_coarse(*box.xyxy) for box in boxes)


def _coarse(x0: int, y0: int, x1: int, y1: int) -> Rect:
    """A box on the finer grid as one from 0 to 999."""
    return round(x0 / _FINE, 3), round(y0 / _FINE, 3), round(x1 / _FINE, 3), round(y1 / _FINE, 3)


def match_boxes(expected: Sequence[Rect], answered: Sequence[Rect]) -> list[float]:
    """The IoU of each expected box with the answered one that it gets, 0 where it gets none.

    Pairs are made one to one, the best first; the order of the boxes does not matter.
    """
    pairs = [(iou(a, b), i, j) for i, a in enumerate(expected) for j, b in enumerate(answered)]
    found, taken = [0.0] * len(expected), set()
    for value, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if value > 0 and not found[i] and j not in taken:
            found[i] = value
            taken.add(j)
    return found


def iou(a: Rect, b: Rect) -> float:
    """Area that two rectangles share, as a part of the area that they cover together."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return width * height / (sum(areas) - width * height)


def aggregate(scores: Sequence[Score]) -> dict[str, Any]:
    """Means over scores.

    Returns:
      `questions`, their number, and from 0 to 1: `correct`, `exact_match`, `acc50`, `mean_iou`,
      `refused`; None where there is nothing to take the mean of.
    """

    def mean(name: str) -> float | None:
        values = [getattr(one, name) for one in scores]
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    names = {"exact_match": "exact", "acc50": "acc50", "mean_iou": "iou", "refused": "refused"}
    means = {"correct": mean("correct")} | {key: mean(name) for key, name in names.items()}
    return {"questions": len(scores), **means}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Questions with known answers.

    Attributes:
      families: kinds of questions, name -> what they ask.
      splits: names; the first is the usual one.
      question: (family, index, split=, seed=) -> a question as `synthetic.Question`.
      summary: measure of `aggregate` -> the families whose mean stands for the whole.
    """

    families: Mapping[str, str]
    splits: Sequence[str]
    question: Callable[..., synthetic.Question]
    summary: Mapping[str, Sequence[str]]

    def check_split(self, split: str) -> str:
        """The split; UserError for an unknown one."""
        if split not in self.splits:
            raise UserError(f"no split {split!r}; there are {', '.join(self.splits)}")
        return split

    def check_families(self, names: Sequence[str]) -> list[str]:
        """The families, each once; UserError for an unknown one, or none."""
        unknown = [name for name in names if name not in self.families]
        if unknown or not names:
            what = f"no family {unknown[0]!r}" if unknown else "no family is named"
            raise UserError(f"{what}; there are {', '.join(self.families)}")
        return list(dict.fromkeys(names))

    def summarise(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
        """The few numbers that matter, of those families that were asked.

        Args:
          scores: of each family.

        Returns:
          Measure -> `value`, 0 to 1, over all `questions` of the `families`.
        """
        found = {}
        for measure, names in self.summary.items():
            asked = [name for name in names if scores.get(name)]
            if asked:
                means = aggregate([one for name in asked for one in scores[name]])
                count, value = means["questions"], means[measure]
                found[measure] = {"value": value, "questions": count, "families": asked}
        return found


DATASETS: Mapping[str, Dataset] = {
    "synthetic": Dataset(
        families=synthetic.FAMILIES,
        splits=sorted(ALLOWED, key=lambda split: split != "heldout"),
        question=synthetic.question,
        summary={
            "exact_match": ("colour", "shape", "count", "digit"),
            "acc50": ("grounding",),
            "refused": ("absent",),
        },
    ),
}


def find_dataset(name: str) -> Dataset:
    """A data set by its name; UserError for an unknown one."""
    if name not in DATASETS:
        raise UserError(f"no data {name!r}; there is {', '.join(DATASETS)}")
    return DATASETS[name]
