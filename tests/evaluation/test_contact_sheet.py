"""The contact sheet: positions and colours."""

import PIL.Image
import pytest

from vl2jax.evaluation.contact_sheet import (
    CARD_WIDTH,
    RIGHT,
    WRONG,
    Card,
    draw_card,
    draw_sheet,
    wrap,
)
from vl2jax.processing.grounding import fit_text

HEAD, PAD = 24, 8
GREY = (90, 90, 90)


def card(**changes):
    picture = PIL.Image.new("RGB", (80, 40), GREY)
    options = {"name": "grounding 3", "correct": True, "pictures": [picture], "question": "Where?"}
    return Card(**(options | {"expected": "there", "answer": "there"} | changes))


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 20)}


def pixel(drawn, x, y):
    """A pixel of a card, relative to the top left corner of its image."""
    return drawn.getpixel((PAD + x, HEAD + PAD + y))


@pytest.mark.parametrize(("correct", "colour"), [(True, RIGHT), (False, WRONG)])
def test_right_and_wrong_are_seen_at_one_look(correct, colour):
    drawn = draw_card(card(correct=correct, note="IoU 0.51"))
    assert drawn.width == CARD_WIDTH
    assert [drawn.getpixel(at) for at in ((0, 0), (CARD_WIDTH - 1, HEAD - 1))] == [colour] * 2
    assert drawn.getpixel((0, HEAD)) == (255, 255, 255)
    other = WRONG if correct else RIGHT
    assert colour in colours(drawn) and other not in colours(drawn)


def test_small_pictures_are_enlarged():
    drawn = draw_card(card())
    assert pixel(drawn, 0, 0) == GREY and pixel(drawn, 3 * 80 - 1, 3 * 40 - 1) == GREY
    assert pixel(drawn, 3 * 80, 0) == (255, 255, 255)
    assert pixel(drawn, 0, 3 * 40) == (255, 255, 255)


def test_large_pictures_are_made_to_fit():
    drawn = draw_card(card(pictures=[PIL.Image.new("RGB", (2000, 1000), GREY)]))
    assert pixel(drawn, CARD_WIDTH - 2 * PAD - 1, 121) == GREY
    assert pixel(drawn, CARD_WIDTH - 2 * PAD, 121) == (255, 255, 255)


def test_boxes_lie_where_they_are():
    """The image is drawn at 240 x 120 pixels; 999 is its right and its lower edge."""
    drawn = draw_card(card(true_boxes=[(333, 333, 666, 666)], answered_boxes=[(0, 0, 166.5, 500)]))
    assert pixel(drawn, 80, 60) == RIGHT and pixel(drawn, 160, 60) == RIGHT
    assert pixel(drawn, 120, 40) == RIGHT and pixel(drawn, 120, 80) == RIGHT
    assert pixel(drawn, 0, 30) == WRONG and pixel(drawn, 40, 30) == WRONG
    assert pixel(drawn, 120, 60) == GREY and pixel(drawn, 20, 30) == GREY


def test_boxes_that_agree_are_both_seen():
    boxes = [(333, 333, 666, 666)]
    drawn = draw_card(card(true_boxes=boxes, answered_boxes=boxes))
    assert pixel(drawn, 80, 60) == WRONG and pixel(drawn, 82, 60) == RIGHT


def test_a_box_outside_is_cut():
    drawn = draw_card(card(answered_boxes=[(-1e300, 500, 1e300, 1e18)]))
    assert pixel(drawn, 0, 100) == WRONG and pixel(drawn, 239, 100) == WRONG
    assert pixel(drawn, 120, 100) == GREY


def test_boxes_are_drawn_on_their_picture_only():
    pictures = [PIL.Image.new("RGB", (40, 40), GREY), PIL.Image.new("RGB", (40, 40), (9, 9, 9))]
    drawn = draw_card(card(pictures=pictures, true_boxes=[(0, 0, 999, 999)], boxes_image=1))
    side = int(40 * (CARD_WIDTH - 2 * PAD - 6) / 80)
    first = drawn.crop((PAD, HEAD + PAD, PAD + side, HEAD + PAD + side))
    assert colours(first) == {GREY}
    assert pixel(drawn, side + 6, 30) == RIGHT


def test_without_pictures():
    assert draw_card(card(pictures=[])).height == draw_card(card()).height - 3 * 40 - 5


def test_any_text_is_drawn():
    plain = draw_card(card(answer=""))
    long = draw_card(card(answer="图中没有红色的圆形 \x00\n\ud83d " * 200))
    longer = draw_card(card(answer="z" * 5000))
    assert plain.height < long.height == longer.height


def test_lines_are_not_wider_than_they_may_be():
    _, font = fit_text("abc", 13)
    text = "a few words, then " + "w" * 80 + " and more, 中文字不用空格 too"
    lines = wrap(text, font, 120, 99)
    assert len(lines) > 5
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    cut = wrap(text, font, 120, 2)
    assert len(cut) == 2 and cut[1].endswith("...") and font.getlength(cut[1]) <= 120
    assert cut[0] == lines[0]
    assert wrap("", font, 120, 2) == [""]
    assert wrap("ab", font, 120, 1) == ["ab"]


def test_cards_lie_in_rows():
    rows = [[card(), card(correct=False), card()], [card(correct=False)]]
    sheet = draw_sheet("everything", rows)
    height = draw_card(card()).height
    assert sheet.size == (3 * (CARD_WIDTH + 10) + 10, 64 + 2 * height + 3 * 10)
    step = CARD_WIDTH + 10
    heads = [sheet.getpixel((10 + step * column, 64 + 10)) for column in range(3)]
    assert heads == [RIGHT, WRONG, RIGHT]
    below = [sheet.getpixel((10 + step * column, 64 + 20 + height)) for column in range(2)]
    assert below == [WRONG, (226, 228, 232)]


def test_a_sheet_without_cards_has_a_title():
    assert draw_sheet("nothing", []).size == (2 * (CARD_WIDTH + 10) + 10, 64 + 10)
