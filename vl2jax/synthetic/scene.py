"""Scenes: coloured shapes, and optionally a text, that do not overlap; their random placement."""

import dataclasses

import PIL.Image
import PIL.ImageDraw

from vl2jax.synthetic import paint
from vl2jax.synthetic.dice import Dice
from vl2jax.synthetic.words import COLOURS, HELD_OUT, PAIRS, SHORT_WORDS

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are exclusive

TRAIN, HELDOUT, COMBINATIONS = "train", "heldout", "combinations"
# The pairs of colour and shape in images and questions of each split.
ALLOWED = {
    TRAIN: tuple(pair for pair in PAIRS if pair not in HELD_OUT),
    HELDOUT: PAIRS,
    COMBINATIONS: HELD_OUT,
}
# Weights of image sizes (width, height); None: one side is `LONGEST` and the other is shorter.
SIZES = {(76, 76): 84, None: 3, (152, 76): 4, (76, 152): 4, (114, 76): 2, (90, 72): 2, (72, 90): 1}
SHORTEST, LONGEST = 60, 76
# Weights of the number of shapes: without a text, in the lesson about places, and with a text.
COUNTS = {1: 30, 2: 28, 3: 24, 4: 18}
MOSTLY_TWO = {1: 5, 2: 60, 3: 22, 4: 13}
COUNTS_BESIDE = {1: 45, 2: 40, 3: 15}
# Sides of shapes, relative to the shorter side of the image.
SIDES, SIDES_BESIDE = (0.27, 0.35), (0.27,)
DIGIT_HEIGHTS, DIGIT_HEIGHTS_BESIDE = (40, 50), (30, 36)
# Shapes and texts are aligned to the patch grid of `configs/tiny.py` if there is room.  Then the
# same patches occur often, and the vision tower learns them from few images.
GRID = 14
# Without a text, each shape is at the top left of its own window of 2 x 2 patches, which the
# adaptor merges into one token.  `BEGINS` has the offsets of the two windows along a side of 76
# pixels.
WINDOW = 2 * GRID
BEGINS = (0, WINDOW)
INKS = ((20, 20, 20), (20, 20, 90), (90, 20, 20), (20, 70, 30))
GAP = 2  # minimum distance of two objects in pixels
# Empty margins at the left or top and at the right or bottom edge, relative to the side.  Patches
# of 14 pixels do not cover the last 6 of 76 pixels, so the model would not see an edge there.
_NEAR, _FAR = 0.02, 0.085


@dataclasses.dataclass(frozen=True)
class Thing:
    """A coloured shape.

    Attributes:
      colour: name of the colour.
      shape: name of the shape.
      rgb: the shade of the colour.
      side: approximate side in pixels.
      box: the bounding box of its pixels.
    """

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
        """Area of the box in pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])

    def centre(self, axis: int) -> float:
        """Returns the centre of the box along axis 0 (from the left) or 1 (from the top)."""
        return (self.box[axis] + self.box[axis + 2]) / 2


@dataclasses.dataclass(frozen=True)
class Writing:
    """A text in an image.

    Attributes:
      kind: "digit", "number" or "word".
      text: the text.
      rgb: colour of the text.
      room: maximum (height, width), to which the text was fitted.
      box: the bounding box of its pixels.
    """

    kind: str
    text: str
    rgb: paint.Rgb
    room: tuple[int, int]
    box: Box


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of one image.

    Attributes:
      size: (width, height) in pixels.
      background: colour of the background.
      things: the shapes, in arbitrary order.
      writing: the text, if there is one.
    """

    size: tuple[int, int]
    background: paint.Rgb
    things: tuple[Thing, ...] = ()
    writing: Writing | None = None

    def find(self, colour: str | None = None, shape: str | None = None) -> list[Thing]:
        """Returns the things of a colour, a shape, or both, from left to right; None: any."""
        found = [
            thing
            for thing in self.things
            if colour in (None, thing.colour) and shape in (None, thing.shape)
        ]
        return sorted(found, key=lambda thing: thing.box)

    def paint(self) -> PIL.Image.Image:
        """Draws the image, mode RGB."""
        picture = PIL.Image.new("RGB", self.size, self.background)
        for thing in self.things:
            picture.paste(paint.LINE, thing.box, paint.shape_mask(thing.shape, thing.side))
            picture.paste(thing.rgb, thing.box, paint.inner_mask(thing.shape, thing.side))
        if self.writing:
            mask = paint.text_mask(self.writing.text, *self.writing.room)
            picture.paste(self.writing.rgb, self.writing.box, mask)
        return picture


def to_thousandths(box: Box, size: tuple[int, int]) -> Box:
    """Converts a box in pixels to coordinates 0..999; 999 is the right or bottom edge.

    Args:
      box: the box in pixels.
      size: (width, height) of the image in pixels.
    """
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
    """Makes a random scene.

    Args:
      dice: random generator.
      split: the split, which determines the pairs of colour and shape.
      writing: kind of the text, "digit", "number" or "word"; None: no text.
      alone: whether there are no shapes next to the text.
      counts: weights of the number of shapes, if there is no text.
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
    """Draws an image size (width, height) from `SIZES`."""
    size = dice.weighted(SIZES)
    if size is not None:
        return size
    shorter = dice.between(SHORTEST, LONGEST)
    return (shorter, LONGEST) if dice.chance(0.5) else (LONGEST, shorter)


def light(dice: Dice) -> paint.Rgb:
    """Draws the colour of a background: nearly white, with a slight tint."""
    base = dice.between(238, 250)
    red, green, blue = (base + dice.between(-6, 5) for _ in range(3))
    return red, green, blue


def place(
    dice: Dice, ink: tuple[int, int], size: tuple[int, int], taken: list[Box], tries: int = 40
) -> Box | None:
    """Draws a free place, away from the margins and from other boxes.

    Args:
      dice: random generator.
      ink: (width, height) of the new box.
      size: (width, height) of the image.
      taken: boxes that the new box must not touch.
      tries: maximum number of attempts.

    Returns:
      The box; None if no free place was found.
    """
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
    """Draws a number from low to high; a multiple of `GRID` if there is one."""
    first, last = -(-low // GRID), high // GRID
    return GRID * dice.between(first, last) if first <= last else dice.between(low, high)


def _place_things(
    dice: Dice,
    split: str,
    size: tuple[int, int],
    taken: list[Box],
    counts: dict[int, int] | None,
) -> list[Thing]:
    """Places things without touching `taken`; `counts` is None if there is a text."""
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
    """Draws a small change of a colour."""
    red, green, blue = (dice.between(-most, most) for _ in range(3))
    return red, green, blue


def _draw_windows(dice: Dice, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Top left corners of the four windows, in random order."""
    begins = []
    for side in size:
        first, second = BEGINS
        if side == 2 * LONGEST:  # two tiles: a window in each
            first, second = dice.pick(BEGINS), LONGEST + dice.pick(BEGINS)
        elif side != LONGEST:
            second = round(second * side / LONGEST)
        begins.append((first, second))
    return dice.sample([(x, y) for x in begins[0] for y in begins[1]], 4)


def _place_in_window(
    ink: tuple[int, int], size: tuple[int, int], window: tuple[int, int]
) -> Box | None:
    """The box of size `ink` at the top left of a window; None if the window is too small."""
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
    """Draws pairs of colour and shape; most scenes repeat a shape or colour, for counting."""
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
    assert box is not None  # the text fits, and there are no other boxes yet
    rgb = paint.shade(dice.pick(INKS), _shift(dice, 10))
    return Writing(kind, text, rgb, room, box)
