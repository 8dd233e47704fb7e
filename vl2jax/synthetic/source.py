"""Endless rows by number: the mixture, whole conversations for training, single questions."""

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

LENGTH = 2**31 - 1  # there is no end; iterators of the pipeline want a number
CHINESE = 0.2  # share of rows
SINGLE = 0.2  # share of rows with one question
TURNS = (3, 8)  # in the others, where there is so much to ask
MOST_TEXT = 270  # width of all turns of a row, so that any row fits into a short sequence
# A question names what later ones ask for ("the red circle"), so most rows begin with those that
# give little away; the rest are shuffled.
SORTED = 0.7

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of question.

    Attributes:
      says: one line for people.
      ask: asks one, or gives None where the pictures are not fit for it.
      pictures: which `PICTURES` it is asked about by itself.
      weight: how often it is asked, among those that the pictures admit.
      reveals: its place in a sorted row: what gives most away comes last.
    """

    says: str
    ask: Ask
    pictures: str
    weight: float
    reveals: int = 0


# Name -> what it is.  The weights are those of training.
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
    """A kind of row: how its pictures are made, what is asked about them, how often it comes."""

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
    "mostly_two": Pictures(_scene(counts=MOSTLY_TWO), _ON_SHAPES, 0),  # for lessons alone
    "none": Pictures(lambda dice, split: Situation(split), ("text",), 3),
}


class Lesson(NamedTuple):
    """What training begins with: how many rows, what they ask, and about which `PICTURES`."""

    rows: int
    families: frozenset[str]
    pictures: dict[str, float]


# Answers of one word tell most about the picture with few tokens; beside boxes and descriptions
# they would be a small part of the gradient.  Places come next: of one thing alone the place is
# known without its name, so most of these pictures have two.  Last comes all the rest.
WORDS_FIRST = frozenset(("colour", "shape", "count", "digit"))
PLACES_NEXT = WORDS_FIRST | {"grounding", "quarter", "absent"}
LESSONS = (
    Lesson(16000, WORDS_FIRST, {"shapes": 48, "digit": 20}),
    Lesson(28000, PLACES_NEXT, {"mostly_two": 48, "digit": 6}),
)
_SPLITS = {name: number for number, name in enumerate(ALLOWED)}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with its true answer.

    Attributes:
      row: a single user turn, without an answer.
      family: a name of `FAMILIES`.
      kind: "text", "box" or "absent".
      boxes: x0, y0, x1, y1 from 0 to 999 over picture number `boxes_image`, in the answer's order.
    """

    row: Row
    answer: str
    family: str
    kind: str
    boxes: tuple[tuple[int, int, int, int], ...]
    boxes_image: int


class Synthetic:
    """A source of rows; each depends on nothing but split, seed and its number.

    Args:
      split: "train", "heldout" (other pictures, all pairs of colour and shape) or "combinations"
        (only pairs that training never shows).
      families: names of `FAMILIES`; None for all.
      lessons: whether the first rows ask no more than `LESSONS` say.

    Attributes:
      ordered: whether rows are to be read by number, not shuffled.
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
        """What a row says and is about, before anything is drawn."""
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
        """Different questions about the same pictures."""
        names = [name for name in PICTURES[kind].families if name in families]
        own = next((name for name in names if MIXTURE[name].pictures == kind != "shapes"), None)
        language = pick_language(dice)
        weights = {name: MIXTURE[name].weight for name in names}
        count = 1 if dice.chance(SINGLE) else dice.between(*TURNS)
        found: dict[tuple[str, str], Turn] = {}
        room = MOST_TEXT
        for number in range(2 * count):
            # What the pictures were made for comes for certain, where it is one thing.
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
    """The lesson that a row belongs to; None behind the last."""
    for lesson in LESSONS:
        if index < lesson.rows:
            return lesson
        index -= lesson.rows
    return None


def _pictures_of(families: frozenset[str]) -> dict[str, float]:
    """Weights of the pictures that have any of the families for their own."""
    return {
        name: pictures.weight
        for name, pictures in PICTURES.items()
        if any(MIXTURE[family].pictures == name for family in families)
    }


def question(family: str, index: int, split: str = "heldout", seed: int = 0) -> Question:
    """Question number `index` of a family: always the same one, and there is no last.

    Raises:
      UserError: an unknown family or split, or a negative number.
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
    """The language of a row, "en" or "zh"."""
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
    """The split; UserError for an unknown one."""
    if split not in ALLOWED:
        raise UserError(f"synthetic data: split is {split!r}; choose one of {', '.join(ALLOWED)}")
    return split


def check_family(name: str) -> str:
    """The name of a family; UserError for an unknown one."""
    if name not in MIXTURE:
        raise UserError(f"synthetic data: no family {name!r}; there are {', '.join(MIXTURE)}")
    return name


def _check_number(name: str, value: int) -> int:
    if value < 0:
        raise UserError(f"synthetic data: {name} is {value}; it must not be negative")
    return int(value)
