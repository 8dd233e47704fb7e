"""Questions about coloured shapes: attributes, counts, places, relations, and absent shapes.

An `ask` function returns None if no such question can be asked about the scene.
"""

from vl2jax.synthetic.dice import Dice
from vl2jax.synthetic.phrases import ABSENT as REFUSAL
from vl2jax.synthetic.phrases import QUARTERS, SIDES, YES, box_list, phrase, question_only
from vl2jax.synthetic.scene import ALLOWED, Scene, Thing, to_thousandths
from vl2jax.synthetic.turns import ABSENT, BOX, Situation, Turn
from vl2jax.synthetic.words import (
    COLOURS,
    SHAPES,
    colour_name,
    pair_name,
    shape_name,
    with_article,
)

APART = 0.16  # minimum distance of centres for relations, relative to the side of the image
LARGER = 1.6  # minimum ratio of areas for comparisons


def ask_colour(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the colour of a shape that occurs once."""
    scene = situation.scene
    unique = [thing for thing in scene.things if len(scene.find(shape=thing.shape)) == 1]
    if not unique:
        return None
    thing = dice.pick(unique)
    shape = shape_name(thing.shape, language)
    texts = phrase(
        dice, "colour", language, shape=shape, colour=colour_name(thing.colour, language)
    )
    return Turn(*texts, about=thing.shape)


def ask_shape(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the shape of a colour that occurs once."""
    scene = situation.scene
    unique = [thing for thing in scene.things if len(scene.find(colour=thing.colour)) == 1]
    if not unique:
        return None
    thing = dice.pick(unique)
    colour = colour_name(thing.colour, language)
    texts = phrase(dice, "shape", language, colour=colour, shape=shape_name(thing.shape, language))
    return Turn(*texts, about=thing.colour)


def ask_count(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks how many things there are of a shape, of a colour, or in total; 0 to 4."""
    scene, what = situation.scene, dice.weighted({"shape": 0.4, "colour": 0.3, "all": 0.3})
    if what == "all":
        texts = phrase(dice, "count_all", language, count=len(scene.things))
        return Turn(*texts, about="all")
    there = [getattr(thing, what) for thing in scene.things]
    absent = not there or dice.chance(0.12)
    name = dice.pick([*(COLOURS if what == "colour" else SHAPES)] if absent else there)
    if what == "colour":
        fields = {"colour": colour_name(name, language)}
    else:
        fields = {
            "shape": shape_name(name, language),
            "shapes": shape_name(name, language, plural=True),
        }
    texts = phrase(dice, f"count_{what}", language, count=there.count(name), **fields)
    return Turn(*texts, about=name)


def ask_place(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the box of a thing, or sometimes for the boxes of all things of a kind."""
    scene = situation.scene
    if dice.chance(0.2):
        return _ask_places(scene, dice, language)
    named = _named(scene, dice, language)
    if not named:
        return None
    thing, name = dice.pick(named)
    boxes = [to_thousandths(thing.box, scene.size)]
    if language == "en" and dice.chance(0.5):
        name = f"the {name}"
    texts = phrase(dice, "locate", language, name=name, boxes=box_list(boxes))
    return Turn(*texts, about=str(thing.box), kind=BOX, boxes=tuple(boxes))


def ask_quarter(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the quarter of the image that contains the centre of a thing."""
    scene = situation.scene
    named = _named(scene, dice, language)
    if not named:
        return None
    thing, name = dice.pick(named)
    below, right = (2 * thing.centre(axis) > scene.size[axis] for axis in (1, 0))
    quarter = QUARTERS[language][below][right]
    texts = phrase(dice, "quarter", language, name=name, quarter=quarter)
    return Turn(*texts, about=str(thing.box))


def _named(scene: Scene, dice: Dice, language: str) -> list[tuple[Thing, str]]:
    """Things with unambiguous names: each unique pair, and some unique shapes and colours."""
    named = [*map(_full_name(language), unique_pairs(scene))]
    for axis, name in (("shape", shape_name), ("colour", _coloured)):
        for thing in scene.things:
            if dice.chance(0.4) and len(scene.find(**{axis: getattr(thing, axis)})) == 1:
                named.append((thing, name(getattr(thing, axis), language)))
    return named


def _ask_places(scene: Scene, dice: Dice, language: str) -> Turn | None:
    axis = dice.pick(("shape", "colour"))
    values = [getattr(thing, axis) for thing in scene.things]
    repeated = sorted({value for value in values if values.count(value) > 1})
    if not repeated:
        return None
    value = dice.pick(repeated)
    if axis == "shape":
        name = shape_name(value, language, plural=True)
    else:
        name = _coloured(value, language) + ("s" if language == "en" else "")
    boxes = [to_thousandths(thing.box, scene.size) for thing in scene.find(**{axis: value})]
    label = f"all {name}" if language == "en" else f"所有{name}"
    question = question_only(dice, "locate_all", language, name=name)
    answer = f"<|ref|>{label}<|/ref|><|det|>{box_list(boxes)}<|/det|>"
    return Turn(question, answer, about=value, kind=BOX, boxes=tuple(boxes))


def ask_absent(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks about a thing that is absent; in half of the cases a similar thing is present."""
    scene, key = situation.scene, dice.weighted({"locate": 0.7, "colour": 0.15, "shape": 0.15})
    colours = [colour for colour in COLOURS if not scene.find(colour=colour)]
    shapes = [shape for shape in SHAPES if not scene.find(shape=shape)]
    if key == "colour":
        name = shape_name(dice.pick(shapes), language)
        question = question_only(dice, key, language, shape=name)
    elif key == "shape":
        colour = dice.pick(colours)
        name = _coloured(colour, language)
        question = question_only(dice, key, language, colour=colour_name(colour, language))
    else:
        pair = _absent_pair(situation, scene, dice)
        if pair is None:
            return None
        name = pair_name(*pair, language)
        article = "the " if language == "en" and dice.chance(0.5) else ""
        question = question_only(dice, key, language, name=article + name)
    return Turn(question, REFUSAL[language].format(name=name), about=name, kind=ABSENT)


def ask_existence(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks whether a thing is present; yes and no are equally frequent."""
    scene, there = situation.scene, dice.chance(0.5)
    if there and not scene.things:
        return None
    pair = dice.pick(scene.things).pair if there else _absent_pair(situation, scene, dice)
    if pair is None:
        return None
    name = pair_name(*pair, language)
    fields = {"name": name, "a_name": with_article(name), "yes": YES[language][there]}
    return Turn(*phrase(dice, "exists", language, **fields), about=name)


def ask_relation(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks whether one thing is left of, right of, above or below another."""
    scene = situation.scene
    things = unique_pairs(scene)
    if len(things) < 2:
        return None
    first, second = dice.sample(things, 2)
    axis = dice.below(2)
    apart = (first.centre(axis) - second.centre(axis)) / scene.size[axis]
    if abs(apart) < APART:
        return None
    beyond = dice.below(2)
    fields = {
        "first": pair_name(*first.pair, language),
        "second": pair_name(*second.pair, language),
        "side": SIDES[language][2 * axis + beyond],
        "yes": YES[language][(apart > 0) == bool(beyond)],
    }
    texts = phrase(dice, "relation", language, **fields)
    return Turn(*texts, about=f"{axis}{sorted((first.pair, second.pair))}")


def ask_comparison(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks which of two things is larger or smaller, by the areas of their boxes."""
    things = unique_pairs(situation.scene)
    if len(things) < 2:
        return None
    first, second = dice.sample(things, 2)
    small, large = sorted((first, second), key=lambda thing: thing.area)
    if large.area < LARGER * small.area:
        return None
    larger = dice.chance(0.5)
    words = {"en": ("smaller", "larger"), "zh": ("小", "大")}[language]
    name = pair_name(*(large if larger else small).pair, language)
    fields = {
        "first": pair_name(*first.pair, language),
        "second": pair_name(*second.pair, language),
        "larger": words[larger],
        "name": f"the {name}" if language == "en" else name,
    }
    texts = phrase(dice, "compare", language, **fields)
    return Turn(*texts, about=f"{sorted((first.pair, second.pair))}")


def unique_pairs(scene: Scene) -> list[Thing]:
    """Returns the things whose pair of colour and shape occurs once."""
    return [thing for thing in scene.things if len(scene.find(*thing.pair)) == 1]


def _absent_pair(situation: Situation, scene: Scene, dice: Dice) -> tuple[str, str] | None:
    absent = [pair for pair in ALLOWED[situation.split] if not scene.find(*pair)]
    near = [pair for pair in absent if scene.find(colour=pair[0]) or scene.find(shape=pair[1])]
    if near and dice.chance(0.5):
        absent = near
    return dice.pick(absent) if absent else None


def _full_name(language: str):
    return lambda thing: (thing, pair_name(thing.colour, thing.shape, language))


def _coloured(colour: str, language: str) -> str:
    """Name of a thing by its colour: "red shape"."""
    return f"{colour_name(colour, language)}的形状" if language == "zh" else f"{colour} shape"
