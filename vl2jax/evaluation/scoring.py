"""Scores answers, and aggregates the scores.

A text answer is correct if it equals the expected text after `normalise`.  A box answer is correct
if it has as many boxes as expected, and each matches a different expected box with an IoU of at
least 0.5; labels are not compared.  If the object in the question is absent, only the expected
sentence is correct.
"""

import dataclasses
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from vl2jax import synthetic
from vl2jax.common.errors import UserError
from vl2jax.processing import grounding
from vl2jax.synthetic.scene import ALLOWED

THRESHOLD = 0.5  # minimum IoU of a correct box
_FINE = 10**6  # pixels per unit; `grounding.parse` rounds to pixels, so this keeps decimal places

Rect = tuple[float, float, float, float]


class Asked(Protocol):
    """Protocol of a question to be scored; `synthetic.Question` implements it.

    Attributes:
      answer: expected text.
      kind: key of `SCORERS`.
      boxes: expected x0, y0, x1, y1 in 0 to 999; empty unless `kind` is "box".
    """

    answer: str
    kind: str
    boxes: Sequence[tuple[int, int, int, int]]


@dataclasses.dataclass(frozen=True)
class Score:
    """Score of one answer.

    Attributes:
      correct: whether the answer is correct by the rule of its kind.
      exact: whether the text matches, for all kinds.
      iou: mean IoU of the boxes, 0 to 1, where missing and surplus boxes count 0; None for other
        kinds.
      acc50: whether the boxes are correct; None for other kinds.
      refused: whether the answer says that the object is absent; None for other kinds.
    """

    correct: bool
    exact: bool
    iou: float | None = None
    acc50: bool | None = None
    refused: bool | None = None


def score(question: Asked, text: str) -> Score:
    """Scores an answer by the rule of its question's kind.

    Args:
      question: the question, with the expected answer.
      text: the answer, with its grounding tokens and without the end token.
    """
    return SCORERS[question.kind](question, text)


def score_text(question: Asked, text: str) -> Score:
    """Correct if the text matches, see `matches`."""
    exact = matches(question.answer, text)
    return Score(exact, exact)


def score_boxes(question: Asked, text: str) -> Score:
    """Correct if the number of boxes is right and each pair has an IoU of at least `THRESHOLD`."""
    answered = answered_boxes(text)
    found = match_boxes(question.boxes, answered)
    count = max(len(question.boxes), len(answered))
    right = len(question.boxes) == len(answered) and all(iou >= THRESHOLD for iou in found)
    iou = sum(found) / count if count else 1.0
    return Score(right, matches(question.answer, text), iou=iou, acc50=right)


def score_absent(question: Asked, text: str) -> Score:
    """Correct if the text is the expected refusal, without boxes."""
    exact = matches(question.answer, text)
    refused = exact and not answered_boxes(text)
    return Score(refused, exact, refused=refused)


# Kind of a question -> the function that scores it.
SCORERS: Mapping[str, Callable[[Asked, str], Score]] = {
    "text": score_text,
    "box": score_boxes,
    "absent": score_absent,
}


def matches(expected: str, text: str) -> bool:
    """Whether two texts are equal after `normalise`."""
    return normalise(expected) == normalise(text)


def normalise(text: str) -> str:
    """Normalises character width (NFKC), case and white space, and removes a final full stop."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text[:-1].rstrip() if text.endswith((".", "。")) else text


def answered_boxes(text: str) -> tuple[Rect, ...]:
    """Parses the boxes of an answer.

    Returns:
      x0, y0, x1, y1 of each box as the model wrote them; coordinates within the image are 0 to
      999.  Empty if a box is malformed, see `grounding.parse`.
    """
    side = grounding.SCALE * _FINE
    boxes = grounding.parse(text, (side, side)).boxes
    return tuple(_coarse(*box.xyxy) for box in boxes)


def _coarse(x0: int, y0: int, x1: int, y1: int) -> Rect:
    """Converts a box from the fine grid to coordinates from 0 to 999."""
    return round(x0 / _FINE, 3), round(y0 / _FINE, 3), round(x1 / _FINE, 3), round(y1 / _FINE, 3)


def match_boxes(expected: Sequence[Rect], answered: Sequence[Rect]) -> list[float]:
    """Matches boxes one to one, greedily by highest IoU.

    Returns:
      The IoU of each expected box with its match; 0 without a match.
    """
    pairs = [(iou(a, b), i, j) for i, a in enumerate(expected) for j, b in enumerate(answered)]
    found, taken = [0.0] * len(expected), set()
    for value, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if value > 0 and not found[i] and j not in taken:
            found[i] = value
            taken.add(j)
    return found


def iou(a: Rect, b: Rect) -> float:
    """Intersection over union of two rectangles; 0 if they do not overlap."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return width * height / (sum(areas) - width * height)


def aggregate(scores: Sequence[Score]) -> dict[str, Any]:
    """Averages scores.

    Returns:
      `questions`, the number of scores, and the means `correct`, `exact_match`, `acc50`, `mean_iou`
      and `refused`, 0 to 1.  A mean is None if no score has this measure.
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
    """A data set of questions with known answers.

    Attributes:
      families: description of each family of questions, by name.
      splits: names of the splits; the first is the default.
      question: (family, index, split=, seed=) -> question.
      summary: families over which each measure of `aggregate` is averaged for the summary.
    """

    families: Mapping[str, str]
    splits: Sequence[str]
    question: Callable[..., synthetic.Question]
    summary: Mapping[str, Sequence[str]]

    def check_split(self, split: str) -> str:
        """Returns the split; raises UserError if it does not exist."""
        if split not in self.splits:
            raise UserError(f"no split {split!r}; there are {', '.join(self.splits)}")
        return split

    def check_families(self, names: Sequence[str]) -> list[str]:
        """Returns the families without duplicates; raises UserError if one is unknown or none."""
        unknown = [name for name in names if name not in self.families]
        if unknown or not names:
            what = f"no family {unknown[0]!r}" if unknown else "no family is named"
            raise UserError(f"{what}; there are {', '.join(self.families)}")
        return list(dict.fromkeys(names))

    def summarise(self, scores: Mapping[str, Sequence[Score]]) -> dict[str, Any]:
        """Computes the measures of `summary` over the families that were evaluated.

        Args:
          scores: scores by family.

        Returns:
          By measure: `value`, the mean over all questions of these families (0 to 1), `questions`,
          their number, and `families`, their names.
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
    """Returns a data set by name; raises UserError if it does not exist."""
    if name not in DATASETS:
        raise UserError(f"no data {name!r}; there is {', '.join(DATASETS)}")
    return DATASETS[name]
