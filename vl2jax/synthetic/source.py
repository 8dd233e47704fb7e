"""The source of synthetic rows: mixture, curriculum, conversations for training, test questions."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vl2jax.common.errors import UserError
from vl2jax.data.row import Row
from vl2jax.synthetic import families_pictures, families_shapes, families_texts
from vl2jax.synthetic.dice import Dice
from vl2jax.synthetic.scene import ALLOWED, COUNTS, MOSTLY_TWO, TRAIN, make_scene
from vl2jax.synthetic.turns import Situation, Turn

Ask = Callable[[Situation, Dice, str], Turn | None]

LENGTH = 2**31 - 1  # rows are unlimited, but the pipeline needs a length
CHINESE = 0.2  # fraction of rows in Chinese
SINGLE = 0.2  # fraction of rows with one question
TURNS = (3, 8)  # range of the number of questions in other rows, if the images allow as many
MOST_TEXT = 270  # maximum width of all turns of a row, so that every row fits into a short sequence
# Fraction of rows whose questions are sorted, because a question can contain the answer of another
# ("the red circle"); those that reveal least come first.  Other rows are in random order.
SORTED = 0.7

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of questions.

    Attributes:
      says: description in a few words.
      ask: generates a question with its answer; returns None if the images do not allow one.
      pictures: key of the `PICTURES` that are made for it.
      weight: weight among the families that can be asked about the same images.
      reveals: sort key of sorted rows: larger if the question reveals more answers of others.
    """

    says: str
    ask: Ask
    pictures: str
    weight: float
    reveals: int = 0


# Families by name, with their weights in training.
MIXTURE = {
    "colour": Family("colour of a shape", families_shapes.ask_colour, "shapes", 17, 1),
    "shape": Family("shape of a colour", families_shapes.ask_shape, "shapes", 17, 1),
    "count": Family("how many, 0 to 4", families_shapes.ask_count, "shapes", 15),
    "digit": Family("one digit", families_texts.ask_digit, "digit", 24),
    "number": Family("two or three digits", families_texts.ask_number, "number", 10),
    "word": Family("a word, read and understood", families_texts.ask_word, "word", 10),
    "grounding": Family("boxes of what is named", families_shapes.ask_place, "shapes", 45, 3),
    "quarter": Family("the quarter it is in", families_shapes.ask_quarter, "shapes", 20, 3),
    "absent": Family("what is not there", families_shapes.ask_absent, "shapes", 12, 2),
    "exists": Family("whether it is there", families_shapes.ask_existence, "shapes", 6, 2),
    "relation": Family("left, right, above, below", families_shapes.ask_relation, "shapes", 4, 3),
    "compare": Family("larger or smaller", families_shapes.ask_comparison, "shapes", 4, 3),
    "caption": Family("all from left to right", families_texts.ask_caption, "shapes", 6, 4),
    "grounded_caption": Family(
        "all with boxes", families_texts.ask_grounded_caption, "shapes", 3, 4
    ),
    "chart": Family("bars of a chart", families_pictures.ask_chart, "chart", 10),
    "in_context": Family(
        "a marked thing found again", families_pictures.ask_in_context, "in_context", 10
    ),
    "three_images": Family("which of three", families_pictures.ask_which_image, "three", 10),
    "text": Family("no picture needed", families_texts.ask_text, "none", 1),
}
FAMILIES = {name: family.says for name, family in MIXTURE.items()}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A kind of images.

    Attributes:
      make: generates the images; returns None if it fails.
      families: names of the families that can be asked about them.
      weight: weight of such rows in training.
    """

    make: Callable[[Dice, str], Situation | None]
    families: tuple[str, ...]
    weight: float


def _scene(writing: str | None = None, alone: float = 0.0, counts: dict[int, int] = COUNTS):
    def make(dice: Dice, split: str) -> Situation:
        scene = make_scene(dice, split, writing=writing, alone=dice.chance(alone), counts=counts)
        return Situation(split, (scene,))

    return make


_ON_SHAPES = tuple(name for name, family in MIXTURE.items() if family.pictures == "shapes")
PICTURES = {
    "shapes": Pictures(_scene(), (*_ON_SHAPES, "text"), 48),
    "digit": Pictures(_scene("digit", alone=0.8), ("digit", *_ON_SHAPES), 20),
    "number": Pictures(_scene("number", alone=0.8), ("number", "absent", "count"), 3),
    "word": Pictures(_scene("word", alone=0.8), ("word", "absent", "count", "text"), 3),
    "chart": Pictures(families_pictures.make_chart, ("chart",), 3),
    "in_context": Pictures(families_pictures.make_in_context, ("in_context",), 3),
    "three": Pictures(families_pictures.make_three, ("three_images",), 2),
    "mostly_two": Pictures(_scene(counts=MOSTLY_TWO), _ON_SHAPES, 0),  # only in `LESSONS`
    "none": Pictures(lambda dice, split: Situation(split), ("text",), 3),
}


class Lesson(NamedTuple):
    """A stage of the curriculum at the beginning of training.

    Attributes:
      rows: number of rows.
      families: names of the families that are asked.
      pictures: weights of the `PICTURES`.
    """

    rows: int
    families: frozenset[str]
    pictures: dict[str, float]


# The first stage has answers of one word: they are informative but short, so next to boxes and
# descriptions they would contribute little to the gradient.  The second stage adds places, mostly
# with two shapes per image: with a single shape, its name is not needed to find it.  Then all
# families follow.
WORDS_FIRST = frozenset(("colour", "shape", "count", "digit"))
PLACES_NEXT = WORDS_FIRST | {"grounding", "quarter", "absent"}
LESSONS = (
    Lesson(16000, WORDS_FIRST, {"shapes": 48, "digit": 20}),
    Lesson(28000, PLACES_NEXT, {"mostly_two": 48, "digit": 6}),
)
_SPLITS = {name: number for number, name in enumerate(ALLOWED)}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its correct answer.

    Attributes:
      row: a single turn of the user, without the answer.
      answer: the correct answer.
      family: key of `FAMILIES`.
      kind: "text", "box" or "absent"; how answers are scored.
      boxes: (x0, y0, x1, y1) of each box of the answer in order, from 0 to 999.
      boxes_image: number of the image that the boxes refer to, from 0.
    """

    row: Row
    answer: str
    family: str
    kind: str
    boxes: tuple[tuple[int, int, int, int], ...]
    boxes_image: int


class Synthetic:
    """A source of rows.  A row depends only on split, seed, families, lessons and its index.

    Args:
      split: "train", "heldout" (other images, all pairs of colour and shape) or "combinations"
        (only pairs that the train split never has).
      seed: seed of the rows.
      families: keys of `FAMILIES`; None: all.
      lessons: whether the first rows follow the curriculum `LESSONS`.

    Attributes:
      ordered: whether the pipeline must not shuffle the rows; true with `lessons`.

    Raises:
      UserError: the split or a family is unknown, or the seed is negative.
    """

    def __init__(
        self,
        split: str = TRAIN,
        seed: int = 0,
        families: Sequence[str] | None = None,
        *,
        lessons: bool = False,
    ):
        self._split = check_split(split)
        self._seed = _check_number("seed", seed)
        self._families = frozenset(check_family(name) for name in families or MIXTURE)
        self._pictures = _pictures_of(self._families)
        self.ordered = lessons

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Row:
        situation, turns = self.conversation(index)
        return _make_row(situation, turns, f"synthetic {self._split} row {index}")

    def conversation(self, index: int) -> tuple[Situation, list[Turn]]:
        """Returns the images and the turns of a row, before the images are drawn."""
        dice = Dice(self._seed, _SPLITS[self._split], 0, _check_number("index", index))
        families, kinds = self._families, self._pictures
        lesson = _lesson(index) if self.ordered else None
        if lesson and families >= lesson.families:
            families, kinds = lesson.families, lesson.pictures
        while True:
            kind = dice.weighted(kinds)
            situation = PICTURES[kind].make(dice, self._split)
            if situation is None:
                continue
            turns = self._ask(kind, families, situation, dice)
            if turns:
                return situation, turns

    def _ask(
        self, kind: str, families: frozenset[str], situation: Situation, dice: Dice
    ) -> list[Turn]:
        """Generates different questions about the same images."""
        names = [name for name in PICTURES[kind].families if name in families]
        own = next((name for name in names if MIXTURE[name].pictures == kind != "shapes"), None)
        language = pick_language(dice)
        weights = {name: MIXTURE[name].weight for name in names}
        count = 1 if dice.chance(SINGLE) else dice.between(*TURNS)
        found: dict[tuple[str, str], Turn] = {}
        room = MOST_TEXT
        for number in range(2 * count):
            # The first question is of the family for which the images were made, if there is one.
            name = dice.weighted(weights) if number else own or dice.weighted(weights)
            turn = MIXTURE[name].ask(situation, dice, language)
            if turn is None or (name, turn.about) in found or turn.width > room:
                continue
            found[name, turn.about] = turn
            room -= turn.width
            if len(found) == count:
                break
        order = list(found)
        if dice.chance(SORTED):
            order.sort(key=lambda key: MIXTURE[key[0]].reveals)
        return [found[key] for key in order]


def _lesson(index: int) -> Lesson | None:
    """The lesson of a row; None after the last lesson."""
    for lesson in LESSONS:
        if index < lesson.rows:
            return lesson
        index -= lesson.rows
    return None


def _pictures_of(families: frozenset[str]) -> dict[str, float]:
    """Weights of the `PICTURES` that are made for any of the families."""
    return {
        name: pictures.weight
        for name, pictures in PICTURES.items()
        if any(MIXTURE[family].pictures == name for family in families)
    }


def question(family: str, index: int, split: str = "heldout", seed: int = 0) -> Question:
    """Generates a question of a family; the same arguments always give the same question.

    Args:
      family: key of `FAMILIES`.
      index: number of the question, from 0 without limit.
      split: see `Synthetic`.
      seed: seed of the questions.

    Raises:
      UserError: the family or split is unknown, or a number is negative.
    """
    check_split(split)
    entry = MIXTURE[check_family(family)]
    stream = zlib.crc32(family.encode())
    seed, index = _check_number("seed", seed), _check_number("index", index)
    dice = Dice(seed, _SPLITS[split], stream, index)
    while True:
        situation = PICTURES[entry.pictures].make(dice, split)
        if situation is None:
            continue
        turn = entry.ask(situation, dice, pick_language(dice))
        if turn:
            break
    row = _make_row(situation, [turn], f"synthetic {split} {family} {index}", answered=False)
    return Question(row, turn.answer, family, turn.kind, turn.boxes, turn.boxes_image)


def pick_language(dice: Dice) -> str:
    """Draws the language of a row, "en" or "zh"."""
    return "zh" if dice.chance(CHINESE) else "en"


def _make_row(
    situation: Situation, turns: Sequence[Turn], where: str, *, answered: bool = True
) -> Row:
    messages, images = [], situation.paint()
    for number, turn in enumerate(turns):
        placeholders = f"{IMAGE}\n" * len(images) if number == 0 else ""
        messages.append({"role": "user", "content": placeholders + turn.question})
        if answered:
            messages.append({"role": "assistant", "content": turn.answer})
    return Row(messages=tuple(messages), images=tuple(images), where=where)


def check_split(split: str) -> str:
    """Returns the split; raises UserError if it is unknown."""
    if split not in ALLOWED:
        raise UserError(f"synthetic data: split is {split!r}; choose one of {', '.join(ALLOWED)}")
    return split


def check_family(name: str) -> str:
    """Returns the name of a family; raises UserError if it is unknown."""
    if name not in MIXTURE:
        raise UserError(f"synthetic data: no family {name!r}; there are {', '.join(MIXTURE)}")
    return name


def _check_number(name: str, value: int) -> int:
    if value < 0:
        raise UserError(f"synthetic data: {name} is {value}; it must not be negative")
    return int(value)
