"""Placeholders of images in texts: those of other tools become `<image>`, or are refused by name.

Placeholders of videos and audio are refused.  In texts that may be code, tags of HTML stay text.
"""

import re
from collections.abc import Sequence

from vl2jax.common.errors import UserError, shown
from vl2jax.processing.prompt import ASSISTANT

PLACEHOLDER = "<image>"
# Whole placeholders of one image, with the number of the image where they have one.
_ALWAYS = re.compile(
    r"<image_placeholder>|<ImageHere>|<image_soft_token>|<start_of_image>|<\|image\|>"
    r"|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>"
    r"|<\|media_start\|>.*?<\|media_end\|>|<\|media_pad\|>"
    r"|<img>(?:<IMG_CONTEXT>)*</img>|<IMG_CONTEXT>"
    r"|\(?<image>(?:\./)?</image>\)?"
    r"|<\|image_?(?P<bar>\d{1,4})\|>|<image[_ ]?(?P<plain>\d{1,4})>"
)
# Only in rows with images; elsewhere they may be code or markup.
_WITH_IMAGES = re.compile(r"<IMAGE>|<Image>|<image\s*/>|\[IMG\]|\[IMAGE\]|\[image\]")
_OTHER_MEDIA = re.compile(
    r"<\|?(?:video|audio|speech|sound|music)(?:_pad|_placeholder|_start|_soft_token|[_ ]?\d+)?\|?>"
    r"|<(?:Video|Audio|Speech)Here>|<\|vision_start\|>(?:<\|video_pad\|>)+<\|vision_end\|>"
    r"|<start_of_audio>",
    re.IGNORECASE,
)
_PATHS = re.compile(r"<img>([^<>\n]{1,300})</img>")


def with_own_placeholders(texts: Sequence[tuple[str, str]], images: int) -> list[str]:
    """Converts the placeholders of other tools to `<image>`.

    Args:
      texts: role and text of each message, in order.
      images: number of images of the row.

    Returns:
      The texts.

    Raises:
      UserError: a text has a placeholder of a video or of audio, a path in place of an image, or
        numbered placeholders that are not in the order of the images.
    """
    numbers: list[int] = []

    def convert(match: re.Match) -> str:
        number = match["bar"] or match["plain"]
        if number is not None:
            numbers.append(int(number))
        return PLACEHOLDER

    converted = []
    for role, text in texts:
        if "<" in text:
            _refuse_other_media(role, text)
            text = _ALWAYS.sub(convert, text)
        converted.append(text)
    first = numbers[0] if numbers else 1
    if first not in (0, 1) or numbers != list(range(first, first + len(numbers))):
        raise UserError(
            f"numbered placeholders of images in the order {shown(numbers)}; give each image once,"
            f" in order, and write {PLACEHOLDER}"
        )
    if images and not any(PLACEHOLDER in text for text in converted):
        converted = [_WITH_IMAGES.sub(PLACEHOLDER, text) for text in converted]
    return converted


def _refuse_other_media(role: str, text: str) -> None:
    """Raises UserError for a placeholder of something that is not an image."""
    for match in _OTHER_MEDIA.finditer(text):
        name = match[0]
        # An element of HTML has an end tag; an answer may mention a tag.
        is_tag = name[1:-1].isalpha() and (role == ASSISTANT or f"</{name[1:]}" in text)
        if not is_tag:
            raise UserError(
                f"{shown(name)} in the text: videos and audio are not read; give frames as"
                " 'images', or leave the row out"
            )
    if role != ASSISTANT and (found := _PATHS.search(text)) is not None:
        raise UserError(
            f"{shown(found[0])} in the text: paths in texts are not read; write {PLACEHOLDER} there"
            " and give the path under 'images'"
        )
