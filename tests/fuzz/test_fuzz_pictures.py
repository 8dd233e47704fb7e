"""Fuzz target: pictures of all formats, and base64, are read or refused in one short line."""

import base64
import io
import pathlib
import warnings

import hypothesis.strategies as st
import PIL.Image
import pytest
from fuzz_case import fuzz, mutated

from vl2jax.data.pictures import picture
from vl2jax.processing.image import image_size, load_image
from vl2jax.processing.image_source import decode_base64

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")


def files(kind):
    """Small whole files of a format."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    found = []
    for mode, options in (("RGB", {}), ("RGB", {"exif": exif}), ("L", {}), ("RGBA", {}), ("P", {})):
        image = PIL.Image.linear_gradient("L").resize((37, 23)).convert(mode)
        file = io.BytesIO()
        try:
            image.save(file, kind, **options)
        except (OSError, ValueError, TypeError):
            continue  # a mode that the format does not have
        found.append(file.getvalue())
    if kind == "PNG":
        info = PIL.PngImagePlugin.PngInfo()
        info.add_text("a", "b" * 99, zip=True)
        file = io.BytesIO()
        PIL.Image.new("I;16", (9, 7)).save(file, "PNG", pnginfo=info)
        found.append(file.getvalue())
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures(kind):
    def read(content):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it passes over
            image = load_image(content)
            assert image.mode == "RGB" and image.size == image_size(content)

    assert fuzz(mutated(files(kind)), read)


def test_base64():
    whole = base64.b64encode(bytes(range(256))).decode()
    pieces = [
        whole,
        "data:image/png;base64,",
        "data:",
        "b'",
        "'",
        "\\n",
        "\n",
        "=",
        "-",
        "_",
        "%0A",
    ]

    def read(text):
        assert isinstance(decode_base64(text), bytes)

    def load(text):
        load_image(picture(text, [pathlib.Path()]))

    texts = st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=9).map("".join)
    assert fuzz(texts, read) and fuzz(texts, load)
