"""Visual grounding: parses the boxes in an answer and draws them with readable labels.

The model writes `<|ref|>label<|/ref|><|det|>[[x0, y0, x1, y1], ...]<|/det|>`, with coordinates
scaled to 0..999 over the width and height of the image.

Pillow's built-in font has only Latin letters.  Other characters are drawn with a system font that
has them; if there is none, they are written as their code point (`U+72D7`).
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

SCALE = 999  # coordinate of the right and the bottom edge

_REF = re.compile(r"<\|ref\|>.*?<\|/ref\|>")  # not across newlines, as in the original
_DET = re.compile(r"<\|det\|>.*?<\|/det\|>")
_TAGS = re.compile(r"<\|/?(?:ref|det)\|>")
_LIST = re.compile(r"\[.*?\]")
_INTEGER = re.compile(r"[+-]?(?:0+|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?")

# The original's box colours, in its order.
COLOURS = (
    *((255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0), (255, 0, 255)),
    *((127, 127, 127), (255, 255, 127), (255, 127, 255), (127, 255, 255), (127, 127, 255)),
    *((127, 255, 127), (255, 127, 127)),
)
LINE_WIDTH = 3
FONT_SIZE, SMALLEST_FONT = 20, 8
# Searched by name in the system's font folders; fonts with the most characters first.
SYSTEM_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSansSC-Regular.otf"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "PingFang.ttc"),
    *("Hiragino Sans GB.ttc", "Arial Unicode.ttf", "msyh.ttc", "simsun.ttc", "DejaVuSans.ttf"),
)

Font = PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont


@dataclasses.dataclass(frozen=True)
class Box:
    """A labelled box in pixels; its coordinates are not clipped to the image."""

    label: str
    xyxy: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Grounding:
    """The boxes of an answer.

    Attributes:
      boxes: the boxes, in the order of the answer; empty if there is any error.
      refused: one message for each error: missing, unpaired or malformed tags and boxes.
      notes: one message for each valid list without a box.
    """

    boxes: tuple[Box, ...] = ()
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def parse(text: str, size: tuple[int, int]) -> Grounding:
    """Parses the boxes of an answer; a single error discards all boxes, as in the original.

    A coordinate must be a decimal number; the text is never evaluated.  As in the original, numbers
    outside 0..999, fractions and more than four numbers (the rest is ignored) are accepted.

    Args:
      text: the answer, with special tokens.
      size: (width, height) of the image in pixels.
    """
    refs, dets = _REF.findall(text), _DET.findall(text)
    if not refs and not dets:
        what = "no complete pair" if _TAGS.search(text) else "no"
        return Grounding(refused=(f"{what} <|ref|>..<|/ref|><|det|>..<|/det|> in the text",))
    if len(refs) != len(dets):
        return Grounding(
            refused=(
                f"{len(refs)} labels <|ref|>..<|/ref|> but {len(dets)} lists <|det|>..<|/det|>,"
                " each on one line",
            )
        )
    boxes, refused, notes = [], [], []
    for ref, det in zip(refs, dets, strict=True):
        label, lists = _strip_tags(ref, "ref"), _strip_tags(det, "det")
        found = _LIST.findall(lists[1:-1])  # without the outer brackets
        if not found:
            notes.append(f"no [x0, y0, x1, y1] within the outer brackets of {lists!r:.60}")
        for one in found:
            try:
                boxes.append(Box(label, _to_pixels(_read_numbers(one), size)))
            except ValueError as error:
                refused.append(f"{one!r:.60} of {label!r:.40}: {error}")
    return Grounding(() if refused else tuple(boxes), tuple(refused), tuple(notes))


def parse_answer(
    text: str, sizes: Sequence[tuple[int, int]], number: int | None = None
) -> Grounding:
    """Parses the boxes of an answer about several images; no error if there are no tags at all.

    Args:
      text: the answer, with special tokens.
      sizes: (width, height) of each image in pixels.
      number: number of the image that the boxes refer to, from 1; None: the last image.
    """
    if not sizes or not ("<|ref|>" in text or "<|det|>" in text):
        return Grounding()
    return parse(text, sizes[-1 if number is None else number - 1])


def _strip_tags(text: str, name: str) -> str:
    return text.replace(f"<|{name}|>", "").replace(f"<|/{name}|>", "")


def _read_numbers(text: str) -> list[int | float]:
    """Parses `[a, b, ...]`; a trailing comma is allowed."""
    parts = [part.strip(" \t") for part in text[1:-1].split(",")]
    if not parts[-1]:
        parts.pop()
    numbers = [_read_number(part) for part in parts]
    if len(numbers) < 4:
        raise ValueError(f"a box needs four numbers, got {len(numbers)}")
    return numbers


def _read_number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    raise ValueError(f"{text!r:.40} is not a decimal number")


def _to_pixels(numbers: list[int | float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Converts the first four numbers to pixels, truncated towards zero."""
    sides = (*size, *size)
    try:
        x0, y0, x1, y1 = (
            int(number / SCALE * side) for number, side in zip(numbers[:4], sides, strict=True)
        )
    except OverflowError as error:
        raise ValueError("a coordinate is infinite") from error
    if x1 < x0 or y1 < y0:
        raise ValueError(f"width or height is negative: {(x0, y0, x1, y1)} in pixels")
    return x0, y0, x1, y1


def summary(found: Grounding) -> str:
    """Summarizes the result of `parse` in a few words: `2 boxes drawn`."""
    count = len(found.boxes)
    reasons = [*found.refused, *found.notes]
    if not reasons and not count:
        reasons = ["the answer has no <|ref|>..<|/ref|><|det|>..<|/det|>"]
    why = f": {'; '.join(reasons)}" if reasons else ""
    return f"{count} {'box' if count == 1 else 'boxes'} drawn{why}"


def draw(image: PIL.Image.Image, boxes: Iterable[Box]) -> PIL.Image.Image:
    """Draws boxes and labels on a copy of an image.

    Boxes are clipped to the image.  A label is drawn above its box, or inside if there is no room,
    and moved so that it stays in the image.  A label larger than the image is shrunk, then cut.

    Args:
      image: the image.
      boxes: the boxes, in pixels.

    Returns:
      A new image of the same size, mode RGB.
    """
    canvas = image.convert("RGB")
    if canvas is image:
        canvas = image.copy()
    pen = PIL.ImageDraw.Draw(canvas)
    for number, box in enumerate(boxes):
        colour = COLOURS[number % len(COLOURS)]
        x0, y0, x1, y1 = clamp(box.xyxy, canvas.size)
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=LINE_WIDTH)
        label = render_label(box.label, colour, canvas.size)
        if label is not None:
            canvas.paste(label, place_label((x0, y0, x1, y1), label.size, canvas.size))
    return canvas


def clamp(xyxy: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Clips a box to the pixels of an image of (width, height) `size`."""
    right, bottom = size[0] - 1, size[1] - 1
    x0, y0, x1, y1 = xyxy
    return (
        min(max(x0, 0), right),
        min(max(y0, 0), bottom),
        min(max(x1, 0), right),
        min(max(y1, 0), bottom),
    )


def place_label(
    box: tuple[int, int, int, int], label: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int]:
    """Chooses the top left corner of a label: above its box, else inside at the top.

    Args:
      box: the box, clipped to the image.
      label: (width, height) of the label.
      size: (width, height) of the image.
    """
    x0, y0, _, _ = box
    x = min(x0, size[0] - label[0])
    y = y0 - label[1] if y0 >= label[1] else y0
    return max(x, 0), max(min(y, size[1] - label[1]), 0)


def render_label(
    label: str, colour: tuple[int, int, int], limit: tuple[int, int]
) -> PIL.Image.Image | None:
    """Renders a label on a coloured background.

    Args:
      label: the text.
      colour: RGB of the background.
      limit: maximum (width, height) in pixels; the font shrinks to fit, then the text is cut.

    Returns:
      An image of mode RGB; None if the text is blank.
    """
    for font_size in range(FONT_SIZE, SMALLEST_FONT - 1, -1):
        text, font = fit_text(label, font_size)
        left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
        width, height = right - left + 4, bottom - top + 4
        if width <= limit[0] and height <= limit[1]:
            break
    if not text:
        return None
    picture = PIL.Image.new("RGB", (min(width, limit[0]), min(height, limit[1])), colour)
    ink = (0, 0, 0) if sum(colour) > 382 or colour[1] == 255 else (255, 255, 255)
    PIL.ImageDraw.Draw(picture).text((2 - left, 2 - top), text, font=font, fill=ink)
    return picture


def fit_text(label: str, size: int) -> tuple[str, Font]:
    """Chooses the font that lacks the fewest characters of a label.

    Args:
      label: the text.
      size: font size.

    Returns:
      The text, with characters that the font lacks replaced by their code points; and the font.
    """
    text = " ".join(label.split())
    font = _built_in(size)
    missing = _missing(text, font)
    if missing:
        for other in _system(size):
            still = _missing(text, other)
            if len(still) < len(missing):
                font, missing = other, still
    spelled = [f" U+{ord(char):04X} " if char in missing else char for char in text]
    return " ".join("".join(spelled).split()) if missing else text, font


def _missing(text: str, font: Font) -> set[str]:
    """Characters for which a font has no glyph."""
    return {char for char in set(text) if not _has_glyph(char, font)}


def _has_glyph(char: str, font: Font) -> bool:
    """Whether a character is drawn differently from a code point that no font has."""
    if not isinstance(font, PIL.ImageFont.FreeTypeFont):
        return char.isascii() and char.isprintable()
    if char == " ":
        return True
    if not char.isprintable():
        return False
    return _glyph(char, font) != _glyph("\U0010ffff", font)


def _glyph(char: str, font: PIL.ImageFont.FreeTypeFont) -> tuple[tuple[int, int], bytes]:
    mask: Any = font.getmask(char)  # an image type of Pillow's core without type stubs
    return mask.size, bytes(mask)


@functools.cache
def _built_in(size: int) -> Font:
    try:
        return PIL.ImageFont.load_default(size)
    except ImportError:  # a Pillow built without FreeType has one bitmap font
        return PIL.ImageFont.load_default_imagefont()


@functools.cache
def _system(size: int) -> tuple[PIL.ImageFont.FreeTypeFont, ...]:
    """Fonts of `SYSTEM_FONTS` that are installed."""
    found = []
    for name in SYSTEM_FONTS:
        try:
            found.append(PIL.ImageFont.truetype(name, size))
        except (OSError, ImportError):  # not installed
            continue
    return tuple(found)
