"""What is in a picture: coloured shapes and perhaps a writing, none over another."""

import dataclasses

import PIL.Image
import PIL.ImageDraw

from vl2jax.synthetic import paint
from vl2jax.synthetic.dice import Dice
from vl2jax.synthetic.words import COLOURS, HELD_OUT, PAIRS, SHORT_WORDS

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are just outside

TRAIN, HELDOUT, COMBINATIONS = "train", "heldout", "combinations"
# The pairs of colour and shape that the pictures and questions of a split may have.
ALLOWED = {
    TRAIN: tuple(pair for pair in PAIRS if pair not in HELD_OUT),
    HELDOUT: PAIRS,
    COMBINATIONS: HELD_OUT,
}
# Width and height in pixels -> how often; None is any size up to a tile with a shorter side.
SIZES = {(76, 76): 84, None: 3, (152, 76): 4, (76, 152): 4, (114, 76): 2, (90, 72): 2, (72, 90): 1}
SHORTEST, LONGEST = 60, 76
# Shapes in a picture -> how often: alone, in the lesson about places, and beside a writing.
COUNTS = {1: 30, 2: 28, 3: 24, 4: 18}
MOSTLY_TWO = {1: 5, 2: 60, 3: 22, 4: 13}
COUNTS_BESIDE = {1: 45, 2: 40, 3: 15}
# Sides of shapes over the shorter side of the picture.
SIDES, SIDES_BESIDE = (0.27, 0.35), (0.27,)
DIGIT_HEIGHTS, DIGIT_HEIGHTS_BESIDE = (40, 50), (30, 36)
# Things lie on a grid of so many pixels, the patches of the small model, where there is room: a
# young vision tower then meets the same patches often, and learns them from few pictures.
GRID = 14
# Without a writing each shape stands in the upper left of a window of its own: two patches wide,
# what the adaptor makes one token of.  The two windows of a side of 76 pixels begin at these.
WINDOW = 2 * GRID
BEGINS = (0, WINDOW)
INKS = ((20, 20, 20), (20, 20, 90), (90, 20, 20), (20, 70, 30))
GAP = 2  # pixels between two things
# Clear strips at the edges, over the side.  Patches of 14 leave 6 of 76 pixels at the right and
# lower edge out: a thing there would have edges that the model cannot see.
_NEAR, _FAR = 0.02, 0.085


@dataclasses.dataclass(frozen=True)
class Thing:
    """A coloured shape and the box of its pixels."""

    colour: str
    shape: str
    rgb: paint.Rgb
    side: int
    box: Box

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def area(self) -> int:
        """Pixels of the box."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def centre(self, axis: int) -> float:
        """Middle of the box: 0 from the left, 1 from the top."""
        return (self.box[axis] + self.box[axis + 2]) / 2


@dataclasses.dataclass(frozen=True)
class Writing:
    """A text in the picture and the box of its pixels.

    Attributes:
      kind: "digit", "number" or "word".
      room: the (height, width) that the text was fitted into.
    """

    kind: str
    text: str
    rgb: paint.Rgb
    room: tuple[int, int]
    box: Box


@dataclasses.dataclass(frozen=True)
class Scene:
    """One picture.

    Attributes:
      size: (width, height).
      things: in the order of drawing, which says nothing.
    """

    size: tuple[int, int]
    background: paint.Rgb
    things: tuple[Thing, ...] = ()
    writing: Writing | None = None

    def find(self, colour: str | None = None, shape: str | None = None) -> list[Thing]:
        """The things of a colour, of a shape, or of both, from left to right."""
        found = [
            thing
            for thing in self.things
            if colour in (None, thing.colour) and shape in (None, thing.shape)
        ]
        return sorted(found, key=lambda thing: thing.box)

    def paint(self) -> PIL.Image.Image:
        """The picture, mode RGB."""
        picture = PIL.Image.new("RGB", self.size, self.background)
        for thing in self.things:
            picture.paste(paint.LINE, thing.box, paint.shape_mask(thing.shape, thing.side))
            picture.paste(thing.rgb, thing.box, paint.inner_mask(thing.shape, thing.side))
        if self.writing:
            mask = paint.text_mask(self.writing.text, *self.writing.room)
            picture.paste(self.writing.rgb, self.writing.box, mask)
        return picture


def to_thousandths(box: Box, size: tuple[int, int]) -> Box:
    """A box in pixels as coordinates of 0 to 999 over the picture; 999 is its far edge."""
    sides = (*size, *size)
    x0, y0, x1, y1 = (round(edge * 999 / side) for edge, side in zip(box, sides, strict=True))
    return x0, y0, x1, y1


def make_scene(
    dice: Dice,
    split: str,
    *,
    writing: str | None = None,
    alone: bool = False,
    counts: dict[int, int] = COUNTS,
) -> Scene:
    """Draws lots for a picture.

    Args:
      split: whose pairs of colour and shape are allowed.
      writing: "digit", "number" or "word" for a picture with one.
      alone: whether the writing is all there is.
      counts: shapes where there is no writing -> how often.
    """
    size = pick_size(dice)
    taken: list[Box] = []
    text = None
    if writing:
        text = _write(dice, size, writing, alone)
        taken.append(text.box)
    things = [] if alone else _place_things(dice, split, size, taken, None if writing else counts)
    return Scene(size, light(dice), tuple(things), text)


def pick_size(dice: Dice) -> tuple[int, int]:
    """A size as `SIZES` says."""
    size = dice.weighted(SIZES)
    if size is not None:
        return size
    shorter = dice.between(SHORTEST, LONGEST)
    return (shorter, LONGEST) if dice.chance(0.5) else (LONGEST, shorter)


def light(dice: Dice) -> paint.Rgb:
    """A background: nearly white, with a slight tint."""
    base = dice.between(238, 250)
    red, green, blue = (base + dice.between(-6, 5) for _ in range(3))
    return red, green, blue


def place(
    dice: Dice, ink: tuple[int, int], size: tuple[int, int], taken: list[Box], tries: int = 40
) -> Box | None:
    """A random box of the size of `ink` that keeps clear of the edges and of what is there."""
    low = [int(side * _NEAR) for side in size]
    high = [int(side * (1 - _FAR)) - extent for side, extent in zip(size, ink, strict=True)]
    if high[0] < low[0] or high[1] < low[1]:
        return None
    for _ in range(tries):
        x, y = (_on_grid(dice, *ends) for ends in zip(low, high, strict=True))
        right, bottom = x + ink[0], y + ink[1]
        for x0, y0, x1, y1 in taken:
            if x < x1 + GAP and x0 < right + GAP and y < y1 + GAP and y0 < bottom + GAP:
                break
        else:
            return x, y, right, bottom
    return None


def _on_grid(dice: Dice, low: int, high: int) -> int:
    """A number from low to high, on the grid if one is."""
    first, last = -(-low // GRID), high // GRID
    return GRID * dice.between(first, last) if first <= last else dice.between(low, high)


def _place_things(
    dice: Dice,
    split: str,
    size: tuple[int, int],
    taken: list[Box],
    counts: dict[int, int] | None,
) -> list[Thing]:
    """Things clear of what is taken; `counts` is None beside a writing."""
    beside = counts is None
    count = dice.weighted(COUNTS_BESIDE if beside else counts)
    sides = SIDES_BESIDE if beside else SIDES
    windows = _draw_windows(dice, size)
    things = []
    for number, (colour, shape) in enumerate(_pick_pairs(dice, ALLOWED[split], count)):
        for smaller in (round(side * min(size)) for side in (dice.pick(sides), sides[0])):
            ink = paint.shape_mask(shape, smaller).size
            if beside:
                box = place(dice, ink, size, taken)
            else:
                box = _place_in_window(ink, size, windows[number])
            if box:
                taken.append(box)
                rgb = paint.shade(COLOURS[colour][1], _shift(dice, 12))
                things.append(Thing(colour, shape, rgb, smaller, box))
                break
    return things


def _shift(dice: Dice, most: int) -> tuple[int, int, int]:
    """A small change of a colour."""
    red, green, blue = (dice.between(-most, most) for _ in range(3))
    return red, green, blue


def _draw_windows(dice: Dice, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Upper left corners of four windows, in random order."""
    begins = []
    for side in size:
        first, second = BEGINS
        if side == 2 * LONGEST:  # two tiles of the small model: a window in each
            first, second = dice.pick(BEGINS), LONGEST + dice.pick(BEGINS)
        elif side != LONGEST:
            second = round(second * side / LONGEST)
        begins.append((first, second))
    return dice.sample([(x, y) for x in begins[0] for y in begins[1]], 4)


def _place_in_window(
    ink: tuple[int, int], size: tuple[int, int], window: tuple[int, int]
) -> Box | None:
    """The box of the size of `ink` in the upper left corner of a window; None where that is too
    small."""
    corner = []
    for side, begin, extent in zip(size, window, ink, strict=True):
        room = WINDOW if side >= LONGEST else WINDOW * side // LONGEST
        if extent > room:
            return None
        corner.append(begin)
    x, y = corner
    return x, y, x + ink[0], y + ink[1]


def _pick_pairs(
    dice: Dice, allowed: tuple[tuple[str, str], ...], count: int
) -> list[tuple[str, str]]:
    """Pairs for the things; most pictures repeat a shape or a colour, to be counted."""
    first = dice.pick(allowed)
    axis = dice.weighted({0: 0.3, 1: 0.35, None: 0.35})
    if axis is None or count == 1:
        return [first] + [dice.pick(allowed) for _ in range(count - 1)]
    alike = [pair for pair in allowed if pair[axis] == first[axis]]
    return [first] + [
        dice.pick(alike) if dice.chance(0.75) else dice.pick(allowed) for _ in range(count - 1)
    ]


def _write(dice: Dice, size: tuple[int, int], kind: str, alone: bool) -> Writing:
    width, height = (int(side * (1 - _NEAR - _FAR)) - 1 for side in size)
    if kind == "digit":
        heights = DIGIT_HEIGHTS if alone else DIGIT_HEIGHTS_BESIDE
        text, room = str(dice.below(10)), (min(dice.pick(heights), height), width)
    elif kind == "number":
        text = str(dice.between(10, 999) if dice.chance(0.5) else dice.between(10, 99))
        room = (min(height, 60), min(width, 80))
    else:
        text, room = dice.pick(SHORT_WORDS), (min(height, 50), width)
    if not alone and kind != "digit":
        room = (min(room[0], 26), room[1])
    ink = paint.text_mask(text, *room).size
    box = place(dice, ink, size, [])
    assert box is not None  # it was fitted, and nothing else is there
    rgb = paint.shade(dice.pick(INKS), _shift(dice, 10))
    return Writing(kind, text, rgb, room, box)
