"""Draws shapes.png, an example image.

python examples/draw_shapes.py
"""

from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont


def draw() -> PIL.Image.Image:
    """Draws four shapes above a number each."""
    picture = PIL.Image.new("RGB", (480, 240), (244, 241, 232))
    pen = PIL.ImageDraw.Draw(picture)
    pen.rectangle((30, 40, 110, 120), fill=(204, 51, 51))
    pen.ellipse((145, 40, 225, 120), fill=(46, 139, 87))
    pen.polygon([(300, 36), (345, 120), (255, 120)], fill=(38, 92, 190))
    pen.polygon([(410, 34), (452, 80), (410, 126), (368, 80)], fill=(235, 180, 40))
    pen.line((20, 140, 460, 140), fill=(60, 60, 60), width=3)
    font = PIL.ImageFont.load_default(48)
    for x, digit in ((70, "3"), (185, "1"), (300, "4"), (410, "2")):
        pen.text((x, 190), digit, fill=(30, 30, 30), font=font, anchor="mm")
    return picture


if __name__ == "__main__":
    draw().save(Path(__file__).with_name("shapes.png"), optimize=True)
