"""Families with their own images: charts, and questions about two or three images."""

import dataclasses

import PIL.Image
import PIL.ImageDraw

from vl2jax.synthetic import paint
from vl2jax.synthetic.dice import Dice
from vl2jax.synthetic.phrases import box_list, phrase
from vl2jax.synthetic.scene import Scene, Thing, light, make_scene, to_thousandths
from vl2jax.synthetic.turns import BOX, Situation, Turn
from vl2jax.synthetic.words import COLOURS, colour_name, pair_name, with_article

HIGHEST = 5  # maximum value of a bar
_AXIS_DIGIT = 10  # height of the axis labels in pixels
_MARK = (225, 20, 20)


@dataclasses.dataclass(frozen=True)
class Chart(Scene):
    """A bar chart with a labelled axis.

    Attributes:
      bars: colour and value of each bar, from left to right; all are different.
    """

    bars: tuple[tuple[str, int], ...] = ()

    def paint(self) -> PIL.Image.Image:
        """Draws the image, mode RGB."""
        picture = PIL.Image.new("RGB", self.size, self.background)
        pen = PIL.ImageDraw.Draw(picture)
        width, height = self.size
        left, bottom = 12, height - 8
        step = (bottom - 6) // HIGHEST
        pen.line((left, 3, left, bottom), fill=(60, 60, 60))
        pen.line((left, bottom, width - 7, bottom), fill=(60, 60, 60))
        for value in range(1, HIGHEST + 1):
            mask = paint.text_mask(str(value), _AXIS_DIGIT, left)
            y = bottom - value * step
            picture.paste((40, 40, 40), (2, y - mask.height // 2), mask)
            pen.line((left - 1, y, width - 7, y), fill=(205, 205, 205))
        slot = (width - left - 7) / len(self.bars)
        for number, (colour, value) in enumerate(self.bars):
            x0 = left + 2 + round(number * slot)
            box = (x0, bottom - value * step, x0 + round(slot) - 4, bottom - 1)
            pen.rectangle(box, fill=COLOURS[colour][1])
        return picture


def make_chart(dice: Dice, split: str) -> Situation:
    """Makes a chart of two to four bars."""
    count = dice.between(2, 4)
    values = dice.sample(range(1, HIGHEST + 1), count)
    bars = tuple(zip(dice.sample([*COLOURS], count), values, strict=True))
    size = dice.weighted({(76, 76): 85, (152, 76): 15})
    return Situation(split, (Chart(size, light(dice), bars=bars),))


def ask_chart(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the tallest or shortest bar, the value of a bar, or the number of bars."""
    chart = situation.scene
    assert isinstance(chart, Chart)
    bars = chart.bars
    key = dice.weighted({"chart_most": 0.45, "chart_value": 0.4, "chart_count": 0.15})
    colour, value = dice.pick(bars)
    tallest = dice.chance(0.5)
    if key == "chart_most":
        colour, _ = (max if tallest else min)(bars, key=lambda bar: bar[1])
    words = {"en": ("shortest", "tallest"), "zh": ("矮", "高")}[language]
    fields = {
        "most": words[tallest],
        "colour": colour_name(colour, language),
        "count": len(bars) if key == "chart_count" else value,
    }
    about = key + (colour if key != "chart_count" else "")
    return Turn(*phrase(dice, key, language, **fields), about=about)


@dataclasses.dataclass(frozen=True)
class Marked(Scene):
    """A scene in which a red rectangle marks one thing.

    Attributes:
      marked: the marked thing.
    """

    marked: Thing | None = None

    def paint(self) -> PIL.Image.Image:
        """Draws the image, mode RGB."""
        picture = super().paint()
        assert self.marked is not None
        x0, y0, x1, y1 = self.marked.box
        pen = PIL.ImageDraw.Draw(picture)
        pen.rectangle((x0 - 3, y0 - 3, x1 + 2, y1 + 2), outline=_MARK, width=2)
        return picture


def make_in_context(dice: Dice, split: str) -> Situation | None:
    """Makes two images; the pair of the marked thing in the first occurs once in the second.

    Returns:
      The images, with the thing of the second image as `extra`; None if this draw gives no such
      images.
    """
    first, second = make_scene(dice, split), make_scene(dice, split)
    if not first.things or not second.things:
        return None
    marked = first.things[0]
    target = second.things[0]
    same = dataclasses.replace(marked, colour=target.colour, shape=target.shape, rgb=target.rgb)
    same = dataclasses.replace(same, box=_box_of(same))
    first = Marked(first.size, first.background, (same, *first.things[1:]), marked=same)
    if len(second.find(*target.pair)) != 1 or not _is_clear(first, same):
        return None
    return Situation(split, (first, second), target)


def _box_of(thing: Thing) -> tuple[int, int, int, int]:
    """The box of a thing after its shape was replaced."""
    x, y = thing.box[:2]
    width, height = paint.shape_mask(thing.shape, thing.side).size
    return x, y, x + width, y + height


def _is_clear(scene: Scene, marked: Thing, margin: int = 3) -> bool:
    """Whether the rectangle around a thing is inside the image and touches no other thing."""
    x0, y0, x1, y1 = marked.box
    if x0 < margin or y0 < margin or x1 + margin > scene.size[0] or y1 + margin > scene.size[1]:
        return False
    return not any(
        x0 - margin < right and left < x1 + margin and y0 - margin < bottom and top < y1 + margin
        for left, top, right, bottom in (one.box for one in scene.things if one is not marked)
    )


def ask_in_context(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks for the box in the second image of the thing that is marked in the first."""
    target = situation.extra
    assert isinstance(target, Thing)
    boxes = [to_thousandths(target.box, situation.scenes[1].size)]
    name = pair_name(*target.pair, language)
    texts = phrase(dice, "in_context", language, name=name, boxes=box_list(boxes))
    return Turn(*texts, about="marked", kind=BOX, boxes=tuple(boxes), boxes_image=1)


def make_three(dice: Dice, split: str) -> Situation:
    """Makes three images."""
    return Situation(split, tuple(make_scene(dice, split) for _ in range(3)))


def ask_which_image(situation: Situation, dice: Dice, language: str) -> Turn | None:
    """Asks which of the images has a thing that the others do not have."""
    number = dice.below(len(situation.scenes))
    there = situation.scenes[number].things
    if not there:
        return None
    pair = dice.pick(there).pair
    if sum(bool(scene.find(*pair)) for scene in situation.scenes) != 1:
        return None
    name = pair_name(*pair, language)
    image = f"image_{number + 1}" if language == "en" else f"图{number + 1}"
    fields = {"name": name, "a_name": with_article(name), "image": image}
    return Turn(*phrase(dice, "which_image", language, **fields), about=name)
