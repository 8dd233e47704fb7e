"""Grounding data in the format of ms-swift: inserts names and boxes into the text."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vl2jax.common.errors import UserError, shown
from vl2jax.processing.grounding import SCALE

NAME, BOX = "<ref-object>", "<bbox>"
_MARKS = re.compile(f"{NAME}|(?:{BOX})+")
# Width and height of the image in the units of each `bbox_type`; None: its size in pixels.
_EXTENTS = {"real": None, "norm1000": 1000, "norm1": 1}

ImageSize = Callable[[int], tuple[int, int]]


def fill_objects(texts: Sequence[str], objects: Any, images: int, size: ImageSize) -> list[str]:
    """Replaces `<ref-object>` and `<bbox>` in texts by names and boxes, in order.

    A name becomes `<|ref|>name<|/ref|>`, consecutive boxes `<|det|>[[x1, y1, x2, y2], ...]<|/det|>`
    with integers from 0 to 999 over the width and height of the image.

    Args:
      texts: the texts of a conversation, in order.
      objects: `{"ref": [name, ...], "bbox": [[x1, y1, x2, y2], ...]}`, and optionally `bbox_type`
        ("real", "norm1000" or "norm1", one for all boxes or a list of one for each; default "real",
        pixels) and `image_id` (the number of each box's image, from 0; default 0).  None: no
        objects.
      images: number of images of the row.
      size: returns (width, height) in pixels of image i, from 0; called only for boxes in pixels.

    Returns:
      The texts with names and boxes.

    Raises:
      UserError: placeholders and objects differ in number, or an object is malformed.
    """
    if objects is None:
        objects = {}
    if not isinstance(objects, Mapping):
        raise UserError(f"'objects' must be like {{'ref': [], 'bbox': []}}, got {shown(objects)}")
    names, boxes = _list(objects, "ref"), _list(objects, "bbox")
    for mark, key, given in ((NAME, "ref", names), (BOX, "bbox", boxes)):
        marks = sum(text.count(mark) for text in texts)
        if marks != len(given):
            raise UserError(
                f"{marks} {mark} in the text but {len(given)} entries in objects[{key!r}];"
                " give one for each, in order"
            )
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"objects['ref'] must hold names, got {shown(name)}")
    left_names = iter(names)
    left_boxes = iter(_scaled(boxes, objects, images, size))

    def fill(mark: re.Match) -> str:
        if mark[0] == NAME:
            return f"<|ref|>{next(left_names)}<|/ref|>"
        run = [next(left_boxes) for _ in range(len(mark[0]) // len(BOX))]
        return f"<|det|>{run}<|/det|>"

    return [_MARKS.sub(fill, text) for text in texts]


def _scaled(
    boxes: Sequence[Any], objects: Mapping[str, Any], images: int, size: ImageSize
) -> list[list[int]]:
    """Converts boxes to integers in 0..999."""
    kinds = _kinds(objects.get("bbox_type", "real"), len(boxes))
    pictures = _list(objects, "image_id") or [0] * len(boxes)
    if len(pictures) != len(boxes):
        raise UserError(
            f"{len(pictures)} entries in objects['image_id'] but {len(boxes)} boxes; give the"
            " number of its picture, from 0, for each box"
        )
    scaled = []
    for number, (box, picture, kind) in enumerate(zip(boxes, pictures, kinds, strict=True), 1):
        if type(picture) is not int or not 0 <= picture < images:
            raise UserError(
                f"box {number} is in picture {shown(picture, 40)} (from 0), but the row has"
                f" {images} pictures; correct objects['image_id'] or give the picture"
            )
        extent = _EXTENTS[kind]
        width, height = size(picture) if extent is None else (extent, extent)
        where = f"image {picture + 1}" if extent is None else f"bbox_type {kind!r}"
        _check_box(f"box {number}", box, (width, height), where)
        scaled.append(
            [round(x / extent * SCALE) for x, extent in zip(box, (width, height) * 2, strict=True)]
        )
    return scaled


def _kinds(value: Any, boxes: int) -> list[str]:
    """The `bbox_type` of each box: one name for all, or a list of one name or of one for each."""
    kinds = list(value) if isinstance(value, list | tuple) else [value]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _EXTENTS:
            raise UserError(f"bbox_type {shown(kind, 40)} is not one of {', '.join(_EXTENTS)}")
    if len(kinds) == 1:
        return kinds * boxes
    if len(kinds) != boxes:
        raise UserError(
            f"{len(kinds)} entries in objects['bbox_type'] but {boxes} boxes; give one for all, or"
            " one for each"
        )
    return kinds


def _check_box(name: str, box: Any, size: tuple[int, int], where: str) -> None:
    width, height = size
    numbers = isinstance(box, list | tuple) and len(box) == 4
    if not numbers or not all(type(x) in (int, float) and abs(x) < math.inf for x in box):
        raise UserError(f"{name} must be four finite numbers [x1, y1, x2, y2], got {shown(box)}")
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise UserError(
            f"{name} {shown(box)} is empty or outside {where} ({width} x {height}); expected"
            f" 0 <= x1 < x2 <= {width} and 0 <= y1 < y2 <= {height}, or another 'bbox_type'"
        )
    unit_box = x2 <= 1 and y2 <= 1  # also the whole image, if it is normalised
    if (width, height) != (1, 1) and (unit_box or (x2 - x1 < 1 and y2 - y1 < 1)):
        raise UserError(
            f"{name} {shown(box)} is smaller than one unit of {where} ({width} x {height});"
            " normalised? then give 'bbox_type': 'norm1' in objects"
        )


def _list(objects: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = objects.get(key, [])
    if not isinstance(value, list | tuple):
        raise UserError(f"objects[{key!r}] must be a list, got {shown(value)}")
    return value
