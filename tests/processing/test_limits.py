"""A sample that is too long is refused or cut before its images are decoded."""

import dataclasses
import gc
import io
import weakref

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from vl2jax.common.errors import UserError
from vl2jax.processing import image as images_lib
from vl2jax.processing.limits import Limits, TooLong


def photo(width=300, height=200, kind="JPEG"):
    file = io.BytesIO()
    PIL.Image.linear_gradient("L").convert("RGB").resize((width, height)).save(file, kind)
    return file.getvalue()


def limits(length, tiles=10**9, truncate=True):
    def check(tokens, used):
        if tokens > length or used > tiles:
            raise TooLong(f"{tokens} tokens, {used} tiles")

    return Limits(length, tiles, truncate, check)


def talk(images, answer="you see", question="which"):
    marks = "<image>" * images
    return [
        {"role": "user", "content": f"{marks}{question}"},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_nothing_is_decoded_for_a_sample_that_is_too_long(processor, monkeypatch, kind):
    def fail(self, *_):
        raise AssertionError("decoded")

    images = [photo(kind=kind)] * 50
    monkeypatch.setattr(images_lib, "load_image", fail)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    for length, tiles in ((100, 10**9), (10**6, 99)):
        with pytest.raises(TooLong, match=r"tokens, \d+ tiles"):
            processor.sample(talk(50), images, inference=False, limits=limits(length, tiles, False))
    config = dataclasses.replace(
        processor.config,
        decoder=dataclasses.replace(processor.config.decoder, max_position_embeddings=100),
    )
    with pytest.raises(TooLong, match="more than max_position_embeddings 100") as error:
        dataclasses.replace(processor, config=config).sample(talk(50), images)
    assert len(str(error.value)) < 400


def test_one_image_is_decoded_at_a_time(processor, monkeypatch):
    pictures, most = [], []
    load = images_lib.load_image

    def counted(source, **options):
        gc.collect()
        most.append(sum(alive() is not None for alive in pictures))
        picture = load(source, **options)
        pictures.append(weakref.ref(picture))
        return picture

    monkeypatch.setattr(images_lib, "load_image", counted)
    sample = processor.sample(talk(9), [photo(300 + n) for n in range(9)])
    assert len(most) == 9 and max(most) <= 1
    assert sample.image_sizes == tuple((300 + n, 200) for n in range(9))


def test_an_image_of_another_size_than_its_header_says(processor, monkeypatch):
    monkeypatch.setattr(images_lib, "image_size", lambda source, exif: (300, 201))
    with pytest.raises(UserError, match="300 x 201 pixels has 300 x 200 when it is decoded"):
        processor.sample(talk(1), [photo()])


@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_a_sample_is_cut_at_its_end_and_never_through_an_image(processor, images):
    pictures = [photo(300 + 50 * n) for n in range(images)]
    asked = talk(images, answer="you see " * 9)
    asked[0]["content"] = "which " * 5 + "<image>see " * images
    options = {"inference": False, "mask_prompt": False}
    whole = processor.sample(asked, pictures, **options)
    assert not whole.truncated
    for length in range(2, len(whole) + 3):
        sample = processor.sample(asked, pictures, limits=limits(length), **options)
        end = len(sample)
        assert end <= length and sample.truncated == (end < len(whole))
        for name in ("tokens", "image_index", "loss_mask"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(whole, name)[:end])
        np.testing.assert_array_equal(sample.tiles, whole.tiles[: len(sample.tiles)])
        visual = (sample.image_index >= 0).sum()
        assert (
            visual
            == sum(sample.image_tokens)
            == sum(whole.image_tokens[: len(sample.image_tokens)])
        )
        assert len(sample.tiles) == sum(1 + w * h for w, h in sample.image_tiles)
        # Cut earlier than asked for only in front of an image.
        assert end in (length, len(whole)) or whole.image_index[end] >= 0
        assert sample.prompt_length <= end
    few = processor.sample(asked, pictures, limits=limits(10**6, len(whole.tiles) - 1), **options)
    assert len(few.image_sizes) == max(images - 1, 0)


def test_documents_are_cut(processor):
    sample = processor.sample_prompt("which " * 50, inference=False, limits=limits(20))
    assert len(sample) == 20 and sample.truncated
    assert sample.tokens[-1] != processor.tokenizer.eos_id


def test_a_sample_without_a_supervised_rest_is_too_long(processor):
    long = talk(0, question="which " * 50)
    with pytest.raises(TooLong, match="nothing that is supervised is left"):
        processor.sample(long, inference=False, mask_prompt=True, limits=limits(20))
    assert len(processor.sample(long, inference=False, mask_prompt=False, limits=limits(20))) == 20


def test_the_model_limits_a_cut_sample_too(processor):
    most = processor.config.decoder.max_position_embeddings
    sample = processor.sample_prompt("no " * 5000, inference=False, limits=limits(10**6))
    assert len(sample) == most and sample.truncated


def test_sizes_of_png_are_read_without_decoding(monkeypatch):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    PIL.Image.new("RGB", (30, 20)).save(file, "PNG", exif=exif)
    assert images_lib.image_size(file.getvalue()) == (20, 30)
    assert images_lib.image_size(file.getvalue(), exif=False) == (30, 20)
    content = file.getvalue()
    start, end = content.index(b"eXIf") - 4, content.index(b"IDAT") - 4
    after = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    assert images_lib.load_image(after).size == images_lib.image_size(after) == (20, 30)
    plain = photo(kind="PNG")

    def fail(self, *_):
        raise AssertionError("decoded")

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    assert images_lib.image_size(plain) == (300, 200)
