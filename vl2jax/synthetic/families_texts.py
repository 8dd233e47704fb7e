"""Questions about text in an image, captions, and questions without an image."""

import itertools

from vl2jax.synthetic.dice import Dice
from vl2jax.synthetic.families_shapes import unique_pairs
from vl2jax.synthetic.phrases import box_list, phrase
from vl2jax.synthetic.scene import Scene, Thing, to_thousandths
from vl2jax.synthetic.turns import BOX, Situation, Turn
from vl2jax.synthetic.words import OPPOSITES, WORDS, pair_name, with_article

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DISTINCT = 3  # minimum distance of left edges in pixels for an order from left to right


def ask_digit(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the digit in the image."""
    writing = situation.scene.writing
    if writing is None or writing.kind != "digit":
        return None
    return Turn(*phrase(dice, "digit", language, text=writing.text), about="digit")


def ask_number(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the number in the image, or for the number of its digits."""
    writing = situation.scene.writing
    if writing is None or writing.kind != "number":
        return None
    key = "number" if dice.chance(0.8) else "number_length"
    texts = phrase(dice, key, language, text=writing.text, count=len(writing.text))
    return Turn(*texts, about=key)


def ask_word(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the word in the image, its first letter, or its meaning in Chinese."""
    writing = situation.scene.writing
    if writing is None or writing.kind != "word":
        return None
    key = dice.weighted({"word": 0.6, "word_letter": 0.3, "word_meaning": 0.1})
    fields = {"letter": writing.text[0], "meaning": WORDS[writing.text]}
    return Turn(*phrase(dice, key, language, text=writing.text, **fields), about=key)


def ask_caption(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for a caption: all things from left to right."""
    things = _row_of_things(situation.scene)
    if not things:
        return None
    names = [pair_name(*thing.pair, language) for thing in things]
    return Turn(*phrase(dice, "caption", language, caption=_list(names, language)), about="all")


def ask_grounded_caption(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for a grounded caption: all things with their boxes, from left to right."""
    things = _row_of_things(situation.scene)
    if not things:
        return None
    boxes = [to_thousandths(thing.box, situation.scene.size) for thing in things]
    names = [pair_name(*thing.pair, language) for thing in things]
    tagged = [
        f"<|ref|>{name}<|/ref|><|det|>{box_list([box])}<|/det|>"
        for name, box in zip(names, boxes, strict=True)
    ]
    texts = phrase(dice, "grounded_caption", language, caption=_list(names, language, tagged))
    return Turn(*texts, about="all", kind=BOX, boxes=tuple(boxes))


def _row_of_things(scene: Scene) -> list[Thing]:
    """All things from left to right; [] if names or order are ambiguous, or there is a text."""
    things = scene.find()
    edges = [thing.box[0] for thing in things]
    close = any(b - a < _DISTINCT for a, b in itertools.pairwise(edges))
    if scene.writing or close or len(unique_pairs(scene)) < len(things):
        return []
    return things


def _list(names: list[str], language: str, tagged: list[str] | None = None) -> str:
    """Joins names: "A red circle, a blue star and a black cross"; `tagged` replaces the names."""
    tagged = tagged or names
    if language == "zh":
        return "、".join(tagged)
    parts = [
        with_article(name)[: -len(name)] + text for name, text in zip(names, tagged, strict=True)
    ]
    listed = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return listed[0].upper() + listed[1:]


def ask_text(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks a question without an image: translation, sum, opposite, or next letter."""
    key = dice.weighted(
        {"to_chinese": 0.3, "to_english": 0.3, "sum": 0.2, "opposite": 0.1, "next_letter": 0.1}
    )
    if key == "sum":
        a, b = dice.below(10), dice.below(10)
        fields = {"a": a, "b": b, "c": a + b}
    elif key == "opposite":
        a, b = dice.sample(dice.pick(OPPOSITES), 2)
        fields = {"a": a, "b": b} if language == "en" else {"a": WORDS[a], "b": WORDS[b]}
    elif key == "next_letter":
        place = dice.below(len(_LETTERS) - 1)
        fields = {"a": _LETTERS[place], "b": _LETTERS[place + 1]}
    else:
        word = dice.pick(_ALL_WORDS)
        fields = {"word": word, "meaning": WORDS[word]}
    question, answer = phrase(dice, key, language, **fields)
    return Turn(question, answer, about=question)


_ALL_WORDS = tuple(WORDS)
