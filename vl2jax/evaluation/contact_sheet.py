"""Contact sheets: one image that shows questions with their images, answers and verdicts."""

import dataclasses
import re
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw

from vl2jax.processing.grounding import SCALE, clamp, fit_text

CARD_WIDTH = 260
PICTURE_SIZE = (CARD_WIDTH - 16, 150)  # maximum size of the images of a card
LARGEST_SCALE = 3  # maximum enlargement of small images
RIGHT, WRONG = (22, 122, 60), (192, 38, 38)
_PAPER, _CARD, _INK, _PALE = (226, 228, 232), (255, 255, 255), (30, 30, 30), (110, 110, 110)
_GAP, _PAD, _HEAD = 10, 8, 24
_TEXT, _TITLE = 13, 20  # font sizes
_LINE = 17
_MOST_LINES = {"Q": 5, "expected": 5, "answer": 6}

# Lines are broken between units: runs of ASCII characters, or single other characters.
_UNITS = re.compile(r"[!-~]+|\s+|.", re.DOTALL)
# Well-formed labels and boxes are shown without their tags; malformed ones keep them.
_PAIR = re.compile(r"<\|ref\|>([^<]*)<\|/ref\|><\|det\|>([^<]*)<\|/det\|>")


@dataclasses.dataclass(frozen=True)
class Card:
    """One question and its answer.

    Attributes:
      name: name of the question.
      correct: whether the answer is correct.
      pictures: images of the question, in order.
      question, expected, answer: texts.
      note: short remark on the score; "": none.
      true_boxes, answered_boxes: x0, y0, x1, y1 in 0 to 999, for image number `boxes_image`.
      boxes_image: number of the image with the boxes, from 0.
    """

    name: str
    correct: bool
    pictures: Sequence[PIL.Image.Image]
    question: str
    expected: str
    answer: str
    note: str = ""
    true_boxes: Sequence[tuple[float, float, float, float]] = ()
    answered_boxes: Sequence[tuple[float, float, float, float]] = ()
    boxes_image: int = 0


def draw_sheet(title: str, rows: Sequence[Sequence[Card]]) -> PIL.Image.Image:
    """Draws cards in rows.

    Args:
      title: one line above the cards.
      rows: rows of cards, which may differ in length.

    Returns:
      An RGB image.
    """
    drawn = [[draw_card(card) for card in row] for row in rows if row]
    heights = [max(card.height for card in row) for row in drawn]
    longest = max((len(row) for row in drawn), default=1)
    width = max(longest, 2) * (CARD_WIDTH + _GAP) + _GAP
    head = _title(title, width)
    size = (width, head.height + sum(heights) + _GAP * (len(drawn) + 1))
    sheet = PIL.Image.new("RGB", size, _PAPER)
    sheet.paste(head, (0, 0))
    y = head.height + _GAP
    for row, height in zip(drawn, heights, strict=True):
        for number, card in enumerate(row):
            x = _GAP + number * (CARD_WIDTH + _GAP)
            sheet.paste(_CARD, (x, y, x + CARD_WIDTH, y + height))
            sheet.paste(card, (x, y))
        y += height + _GAP
    return sheet


def _title(title: str, width: int) -> PIL.Image.Image:
    """Draws the header: the title and the legend of the boxes."""
    band = PIL.Image.new("RGB", (width, 64), _INK)
    pen = PIL.ImageDraw.Draw(band)
    text, font = fit_text(title, _TITLE)
    pen.text((_GAP, 8), wrap(text, font, width - 2 * _GAP, 1)[0], font=font, fill=_CARD)
    text, font = fit_text("true boxes", _TEXT)
    for x, colour, what in ((_GAP, RIGHT, "true boxes"), (110, WRONG, "boxes of the answer")):
        pen.rectangle((x, 40, x + 12, 52), outline=colour, width=3, fill=_CARD)
        pen.text((x + 18, 38), what, font=font, fill=_PAPER)
    return band


def draw_card(card: Card) -> PIL.Image.Image:
    """Draws a card of width `CARD_WIDTH`; its height depends on the content."""
    width = CARD_WIDTH - 2 * _PAD
    colour = RIGHT if card.correct else WRONG
    texts = (("Q", card.question, _INK), ("expected", card.expected, _PALE))
    blocks = [_text_block(*block, width) for block in (*texts, ("answer", card.answer, colour))]
    pictures = _pictures(card)
    parts = [*([pictures] if pictures else []), *blocks]
    height = _HEAD + _PAD + sum(part.height + 5 for part in parts) + 3
    drawn = PIL.Image.new("RGB", (CARD_WIDTH, height), _CARD)
    drawn.paste(_head(card, colour), (0, 0))
    y = _HEAD + _PAD
    for part in parts:
        drawn.paste(part, (_PAD, y))
        y += part.height + 5
    return drawn


def _head(card: Card, colour: tuple[int, int, int]) -> PIL.Image.Image:
    band = PIL.Image.new("RGB", (CARD_WIDTH, _HEAD), colour)
    pen = PIL.ImageDraw.Draw(band)
    verdict = ("correct" if card.correct else "WRONG") + (f", {card.note}" if card.note else "")
    text, font = fit_text(verdict, _TEXT)
    room = font.getlength(text)
    pen.text((CARD_WIDTH - _PAD - room, 4), text, font=font, fill=_CARD)
    text, font = fit_text(card.name, _TEXT)
    name = wrap(text, font, CARD_WIDTH - 3 * _PAD - room, 1)[0]
    pen.text((_PAD, 4), name, font=font, fill=_CARD)
    return band


def _pictures(card: Card) -> PIL.Image.Image | None:
    """Draws the images side by side, with boxes; returns None if there are no images."""
    if not card.pictures:
        return None
    gap = 6
    widths = sum(picture.width for picture in card.pictures)
    room = PICTURE_SIZE[0] - gap * (len(card.pictures) - 1)
    tallest = max(picture.height for picture in card.pictures)
    scale = min(room / widths, PICTURE_SIZE[1] / tallest, LARGEST_SCALE)
    strip = PIL.Image.new("RGB", (PICTURE_SIZE[0], max(1, int(tallest * scale))), _CARD)
    x = 0
    for number, picture in enumerate(card.pictures):
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        shown = picture.convert("RGB").resize(size, PIL.Image.Resampling.BICUBIC)
        if number == card.boxes_image:
            # The true boxes have wider lines, so that both are visible if the boxes are equal.
            _draw_boxes(shown, card.true_boxes, RIGHT, 4)
            _draw_boxes(shown, card.answered_boxes, WRONG, 2)
        strip.paste(shown, (x, 0))
        x += size[0] + gap
    return strip


def _draw_boxes(
    picture: PIL.Image.Image,
    boxes: Sequence[tuple[float, float, float, float]],
    colour: tuple[int, int, int],
    width: int,
) -> None:
    pen = PIL.ImageDraw.Draw(picture)
    for box in boxes:
        sides = (*picture.size, *picture.size)
        # Clamp first, because drawing fails on huge coordinates.
        x0, y0, x1, y1 = (
            round(min(max(edge, -1), SCALE + 1) / SCALE * side)
            for edge, side in zip(box, sides, strict=True)
        )
        pen.rectangle(clamp((x0, y0, x1, y1), picture.size), outline=colour, width=width)


def _text_block(label: str, text: str, colour: tuple[int, int, int], width: int) -> PIL.Image.Image:
    """Draws a label and a text, wrapped to `width`."""
    readable = _PAIR.sub(r"\1 \2", text)
    text, font = fit_text(f"{label}: {readable}", _TEXT)
    lines = wrap(text, font, width, _MOST_LINES[label])
    block = PIL.Image.new("RGB", (width, _LINE * len(lines)), _CARD)
    pen = PIL.ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        pen.text((0, number * _LINE), line, font=font, fill=colour)
    return block


def wrap(text: str, font, width: float, most: int) -> list[str]:
    """Wraps a text.

    Args:
      text: the text.
      font: Pillow font, from `grounding.fit_text`.
      width: maximum width of a line in pixels.
      most: maximum number of lines; a truncated text ends in "...".

    Returns:
      The lines; one empty line for an empty text.
    """
    lines = [""]
    for unit in _UNITS.findall(text):
        # A unit wider than a line is broken at any character.
        for piece in unit if font.getlength(unit) > width else [unit]:
            if lines[-1] and font.getlength(lines[-1] + piece) > width:
                if len(lines) == most:
                    return [*lines[:-1], _shortened(lines[-1], font, width)]
                lines.append("")
            lines[-1] += piece if lines[-1] else piece.lstrip()
    return lines


def _shortened(line: str, font, width: float) -> str:
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
