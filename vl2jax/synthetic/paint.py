"""Alpha masks of shapes and texts, cropped to their visible pixels, so that boxes are exact."""

import functools
import math

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import PIL.ImageFont

Rgb = tuple[int, int, int]

OUTLINE = 1  # width of the dark outline of a shape in pixels; it makes shapes of all colours alike
LINE = (30, 30, 30)
_FINE = 4  # shapes are drawn this many times larger, then reduced, for smooth edges
_FAINTEST = 48  # lower alpha is set to 0, so that boxes do not include invisible pixels
_LARGEST_FONT, _SMALLEST_FONT = 120, 6


@functools.lru_cache(maxsize=1024)
def shape_mask(shape: str, side: int) -> PIL.Image.Image:
    """Returns the alpha mask of a shape.

    Args:
      shape: name of the shape.
      side: approximate side of its box in pixels.

    Returns:
      An image of mode L; it is cached, so do not modify it.
    """
    return _crop(_fine(shape, side).reduce(_FINE))


@functools.lru_cache(maxsize=1024)
def inner_mask(shape: str, side: int) -> PIL.Image.Image:
    """Returns the mask of the inside of a shape, without the outline; same size as `shape_mask`."""
    fine = _fine(shape, side)
    room = PIL.Image.new("L", (fine.width + 2 * _FINE, fine.height + 2 * _FINE), 0)
    room.paste(fine, (_FINE, _FINE))  # a margin, so that the filter also erodes at the image's edge
    thinner = room.filter(PIL.ImageFilter.MinFilter(2 * OUTLINE * _FINE + 1))
    thinner = thinner.crop((_FINE, _FINE, _FINE + fine.width, _FINE + fine.height))
    return thinner.reduce(_FINE).crop(_bounds(fine.reduce(_FINE)))


def _fine(shape: str, side: int) -> PIL.Image.Image:
    fine = PIL.Image.new("L", (side * _FINE, side * _FINE), 0)
    pen = PIL.ImageDraw.Draw(fine)
    edge = side * _FINE - 1
    if shape == "circle":
        pen.ellipse((0, 0, edge, edge), fill=255)
    else:
        pen.polygon([(x * edge, y * edge) for x, y in _OUTLINES[shape]], fill=255)
    return fine


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    corners = []
    for step in range(2 * points):
        radius = inner if step % 2 else 1.0
        angle = math.pi * step / points
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return _fitted(corners)


def _fitted(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Scales corners to fill the unit square, so that all shapes of a side have the same box."""
    low, high = map(min, zip(*corners, strict=True)), map(max, zip(*corners, strict=True))
    (x0, y0), (x1, y1) = low, high
    return [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in corners]


# Corners in the unit square, y down.
_OUTLINES = {
    "square": [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "star": _star(),
    "cross": [
        *((0.32, 0.0), (0.68, 0.0), (0.68, 0.32), (1.0, 0.32), (1.0, 0.68), (0.68, 0.68)),
        *((0.68, 1.0), (0.32, 1.0), (0.32, 0.68), (0.0, 0.68), (0.0, 0.32), (0.32, 0.32)),
    ],
    "diamond": [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)],
}


@functools.lru_cache(maxsize=4096)
def text_mask(text: str, height: int, width: int) -> PIL.Image.Image:
    """Returns the alpha mask of a text in the largest font that fits.

    Args:
      text: the text.
      height: maximum height in pixels.
      width: maximum width in pixels.

    Returns:
      An image of mode L; it is cached, so do not modify it.  With the smallest font it may be
      larger than the limits.
    """
    left, top, right, bottom = _font(64).getbbox(text)
    size = int(64 * min(height / (bottom - top), width / (right - left)))
    size = min(max(size, _SMALLEST_FONT), _LARGEST_FONT)
    while True:
        font = _font(size)
        left, top, right, bottom = font.getbbox(text)
        canvas = PIL.Image.new("L", (math.ceil(right) + 4, math.ceil(bottom) + 4), 0)
        PIL.ImageDraw.Draw(canvas).text((2, 2), text, fill=255, font=font)
        mask = _crop(canvas)
        if (mask.width <= width and mask.height <= height) or size == _SMALLEST_FONT:
            return mask
        size -= 1


@functools.cache
def _font(size: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    return PIL.ImageFont.load_default(size)


def _crop(mask: PIL.Image.Image) -> PIL.Image.Image:
    return _seen(mask).crop(_bounds(mask))


def _seen(mask: PIL.Image.Image) -> PIL.Image.Image:
    return mask.point([value if value >= _FAINTEST else 0 for value in range(256)])


def _bounds(mask: PIL.Image.Image) -> tuple[int, int, int, int]:
    box = _seen(mask).getbbox()
    assert box is not None  # something is drawn
    return box


def shade(colour: Rgb, shift: tuple[int, int, int]) -> Rgb:
    """Adds a shift to a colour, clipped to 0..255."""
    red, green, blue = (min(max(a + by, 0), 255) for a, by in zip(colour, shift, strict=True))
    return red, green, blue
