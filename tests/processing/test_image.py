"""Tests of images: loading, choice of the resolution, views and layout equal the original's."""

import base64
import hashlib
import io
import json
import struct
import urllib.parse
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest

from vl2jax.common.errors import UserError
from vl2jax.processing import image as images_lib
from vl2jax.processing.image_source import decode_base64


@pytest.fixture(
    scope="module", params=["carried", pytest.param("full", marks=pytest.mark.reference)]
)
def goldens(request):
    """Folder with golden data of the processor: the part in this repository, and the full set."""
    name = "data_dir" if request.param == "carried" else "reference"
    return request.getfixturevalue(name) / "processor"


@pytest.fixture(scope="module")
def candidates(data_dir):
    settings = json.loads((data_dir / "processor" / "processor_config.json").read_text())
    return [tuple(pair) for pair in settings["candidate_resolutions"]]


def sha256(views):
    return [hashlib.sha256(view.transpose(2, 0, 1).tobytes()).hexdigest() for view in views]


def png_header(width, height):
    """A PNG whose header gives a size, but without pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_resolutions(goldens, candidates):
    cases = json.loads((goldens / "resolutions.json").read_text())
    assert len(cases) == 274
    for case in cases:
        best = images_lib.select_best_resolution(case["size"], candidates)
        assert list(best) == case["best"], case
        grid = best[0] // 384, best[1] // 384
        assert images_lib.image_tokens(*grid, tile_grid=14) == case["num_image_tokens"], case
        # 0 marks a side that the original rounds to no pixel; here it keeps one.
        for canvas, key in (((384, 384), "global_inner"), (best, "local_inner")):
            expected = [max(1, side) for side in case[key]]
            assert list(images_lib.fitted_size(case["size"], canvas)) == expected, case


def test_resolution_is_chosen_in_floating_point(candidates):
    # Exact arithmetic would choose (768, 1536).
    assert images_lib.select_best_resolution((1523, 2285), candidates) == (768, 1152)


def test_views(goldens, candidates):
    checked = 0
    for name, case in json.loads((goldens / "images.json").read_text())["images"].items():
        picture = images_lib.load_image(goldens / "images" / name, exif=False)
        assert list(picture.size) == case["size"]
        if hashlib.sha256(np.asarray(picture).tobytes()).hexdigest() != case["rgb_sha256"]:
            continue  # this version of Pillow decodes the file differently
        best = images_lib.select_best_resolution(picture.size, candidates)
        assert [best[0] // 384, best[1] // 384] == case["best_tiles_wh"]
        views = images_lib.make_views(picture, best, 384)
        assert views.dtype == np.uint8 and views.shape == (case["num_views"], 384, 384, 3)
        assert sha256(views) == case["tiles_uint8_sha256"], name
        single = images_lib.make_views(picture, (384, 384), 384)
        assert sha256(single) == case["no_tiling"]["tiles_uint8_sha256"], name
        checked += 1
    assert checked >= 9  # at least the PNG files, which every version decodes equally


def test_views_pixel_by_pixel(reference, candidates):
    folder = reference / "processor"
    with np.load(folder / "images.npz") as stored:
        names = {key.rsplit("/", 1)[0] for key in stored.files}
        for name in sorted(names):
            if name.endswith((".jpg", ".webp")):
                continue
            picture = images_lib.load_image(folder / "images" / name, exif=False)
            best = images_lib.select_best_resolution(picture.size, candidates)
            views = images_lib.make_views(picture, best, 384).transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(views[:, :, 6::12, 6::12], stored[f"{name}/grid12"])
            centre = views[:, :, 184:200, 184:200]
            np.testing.assert_array_equal(centre, stored[f"{name}/crop_center"])
            if f"{name}/full" in stored:
                np.testing.assert_array_equal(views, stored[f"{name}/full"])


@pytest.mark.parametrize("size", [(500, 300), (3, 2), (97, 61), (300, 4), (384, 384), (61, 970)])
@pytest.mark.parametrize("canvas", [(384, 384), (768, 384), (56, 168)])
def test_padding_is_that_of_pillow(size, canvas):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = PIL.Image.fromarray(pixels)
    expected = PIL.ImageOps.pad(picture, canvas, color=(127, 127, 127))
    np.testing.assert_array_equal(
        np.asarray(images_lib.pad_to(picture, canvas)), np.asarray(expected)
    )


@pytest.mark.parametrize(
    ("size", "inside"), [((1, 5000), np.s_[:, 28:29]), ((5000, 1), np.s_[28:29, :])]
)
def test_a_thin_picture_keeps_one_pixel(size, inside):
    padded = np.asarray(images_lib.pad_to(PIL.Image.new("RGB", size, (255, 0, 0)), (56, 56)))
    assert (padded[inside] == (255, 0, 0)).all()
    assert (padded == (255, 0, 0)).all(axis=-1).sum() == 56
    assert (padded == (127, 127, 127)).all(axis=-1).sum() == 55 * 56


@pytest.mark.parametrize(
    ("tiles", "grid", "tokens"),
    [((1, 1), 14, 421), ((2, 1), 14, 617), ((1, 2), 14, 631), ((3, 3), 14, 2017), ((2, 1), 2, 17)],
)
def test_image_tokens(tiles, grid, tokens):
    assert images_lib.image_tokens(*tiles, tile_grid=grid) == tokens
    assert len(images_lib.image_layout(*tiles, tile_grid=grid)) == tokens


def test_layout_of_a_wide_image():
    # Rows: 0 newline, 1 separator, 2..5 global view, 6..9 left tile, 10..13 right tile.
    layout = images_lib.image_layout(2, 1, tile_grid=2)
    assert layout.dtype == np.int32
    overview, local = [2, 3, 0, 4, 5, 0], [6, 7, 10, 11, 0, 8, 9, 12, 13, 0]
    assert layout.tolist() == [*overview, 1, *local]
    tail = images_lib.image_layout(2, 1, tile_grid=2, global_view_pos="tail")
    assert tail.tolist() == [*local, 1, *overview]


def test_layout_of_a_high_image_in_a_later_slot():
    # Slot 3 begins at row 2 + 3 * 4 = 14.
    layout = images_lib.image_layout(1, 2, tile_grid=2, first_slot=3).tolist()
    assert layout[:7] == [14, 15, 0, 16, 17, 0, 1]
    assert layout[7:] == [18, 19, 0, 20, 21, 0, 22, 23, 0, 24, 25, 0]


def test_exif_orientation(goldens, tmp_path):
    path = goldens / "images" / "exif_rot6_400x200.jpg"
    raw = images_lib.load_image(path, exif=False)
    turned = images_lib.load_image(path)
    assert raw.size == (400, 200) and turned.size == (200, 400)
    expected = np.asarray(raw.transpose(PIL.Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(np.asarray(turned), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", exif=exif)
    with PIL.Image.open(file) as opened:
        expected = PIL.ImageOps.exif_transpose(opened)
        loaded = images_lib.load_image(file.getvalue())
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(expected))


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_without_decoding_is_that_of_the_loaded_picture(format, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    PIL.Image.new("RGB", (30, 20)).save(file, format, exif=exif)
    for turn in (True, False):
        loaded = images_lib.load_image(file.getvalue(), exif=turn)
        assert images_lib.image_size(file.getvalue(), exif=turn) == loaded.size


def test_size_of_what_cannot_be_loaded():
    assert images_lib.image_size(PIL.Image.new("L", (5, 4))) == (5, 4)
    with pytest.raises(UserError, match="not a picture"):
        images_lib.image_size(b"no picture")
    with pytest.raises(UserError, match="89,478,485 pixels are decoded"):
        images_lib.image_size(png_header(100_000, 100_000))


def test_unreadable_exif_turns_nothing():
    file = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), (9, 8, 7)).save(file, "PNG", exif=b"Exif\0\0nonsense")
    assert images_lib.load_image(file.getvalue()).size == (3, 2)


def test_sources(data_dir, monkeypatch):
    path = data_dir / "processor" / "images" / "gray_97x61.png"
    expected = np.asarray(images_lib.load_image(path))
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    with PIL.Image.open(path) as opened:
        for source in (str(path), data, path.resolve().as_uri(), url, opened):
            loaded = images_lib.load_image(source)
            assert loaded.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(loaded), expected)
    monkeypatch.chdir(path.parent)
    assert images_lib.load_image("gray_97x61.png").size == (97, 61)


def test_a_transparent_palette_gives_no_warning():
    picture = PIL.Image.new("P", (4, 3))
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=bytes([64, 128, 255]))
    with PIL.Image.open(file) as opened:
        assert isinstance(opened.info["transparency"], bytes)
        with pytest.warns(UserWarning, match="Transparency expressed in bytes"):
            opened.convert("RGB")
        assert images_lib.load_image(opened).mode == "RGB"
        assert "transparency" in opened.info  # the caller's image is unchanged
    assert images_lib.load_image(file.getvalue()).size == (4, 3)


def test_text_named_png(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("this is not a picture")
    with pytest.raises(UserError, match=r"notes\.png: not a picture"):
        images_lib.load_image(path)


@pytest.mark.parametrize("name", ["exif_rot6_400x200.jpg", "rgb_500x300.png"])
def test_truncated_file(data_dir, tmp_path, name):
    data = (data_dir / "processor" / "images" / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{name}: damaged or truncated"):
        images_lib.load_image(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: not a picture"):
        images_lib.load_image(path)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jpg: cannot open the picture \(No such file"):
        images_lib.load_image(tmp_path / "absent.jpg")
    with pytest.raises(UserError, match="cannot open the picture"):
        images_lib.load_image(tmp_path)
    with pytest.raises(UserError, match="has a null character"):
        images_lib.load_image("a\0b.png")


@pytest.mark.parametrize("size", [(20_000, 10_000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_by_its_header(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(UserError, match=r"bomb\.png: .*pixels.*at most 89,478,485 pixels"):
        images_lib.load_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.jpg", "not fetched"),
        ("data:image/png,abc", "only data:image/...;base64"),
        ("data:image/png;base64,%%%", "data: URL: not valid base64"),
        ("HTTP://example.com/a.jpg", "not fetched"),
        ("file://elsewhere/a.png", "a path on this host"),
        (7, "must be a path, bytes or a PIL image, got int"),
    ],
)
def test_refused_sources(source, message):
    with pytest.raises(UserError, match=message):
        images_lib.load_image(source)


def test_formats_that_run_other_programs_are_not_opened():
    with pytest.raises(UserError, match="not a picture"):
        images_lib.load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")


def png_with(*chunks, before=True):
    """A PNG of 4 x 3 red pixels, with more chunks before or after its pixels."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), "red").save(file, "PNG")
    whole = file.getvalue()
    more = b"".join(
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )
    cut = 8 + 25 if before else len(whole) - 12
    return whole[:cut] + more + whole[cut:]


LARGE = zlib.compress(bytes(3 << 20))  # more than Pillow decompresses


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"Comment\0\0" + LARGE)],
        [(b"iTXt", b"Comment\0\1\0\0\0" + LARGE)],
        [(b"iCCP", b"sRGB\0\0" + LARGE)],
        [(b"tEXt", b"Comment\0" + b"x" * (1 << 20))] * 65,
        [(b"tEXt", b"k\0v"), (b"zTXt", b"Comment\0\0" + LARGE), (b"iCCP", b"a\0\0" + LARGE)],
    ],
    ids=["zTXt", "iTXt", "iCCP", "tEXt", "several"],
)
def test_large_texts_do_no_harm(chunks, before):
    content = png_with(*chunks, before=before)
    image = images_lib.load_image(content)
    assert image.size == images_lib.image_size(content) == (4, 3)
    assert image.getpixel((3, 2)) == (255, 0, 0)
    with pytest.raises(UserError, match="damaged or truncated"):
        images_lib.load_image(content[:-30] if before else content[:45])


@pytest.mark.parametrize(
    "error", [RuntimeError("no image item"), MemoryError(), AssertionError(), KeyError(7)]
)
def test_a_decoder_may_raise_anything(monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=r"^image bytes: damaged or truncated picture \(.*\); get"):
        images_lib.load_image(png_with())


def test_a_damaged_avif():
    file = io.BytesIO()
    PIL.Image.new("RGB", (40, 30), "red").save(file, "AVIF")
    content = bytearray(file.getvalue())
    for place in range(0, len(content), 7):
        changed = content.copy()
        changed[place] ^= 0xFF
        try:
            images_lib.load_image(bytes(changed))
        except UserError as error:
            assert len(str(error)) < 400


def test_pointers_of_git_lfs_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    with pytest.raises(UserError, match=r"Git LFS.*git lfs pull"):
        images_lib.load_image(pointer)


def encodings(content):
    """Ways to write base64."""
    plain = base64.b64encode(content).decode()
    lines = base64.encodebytes(content).decode()
    urlsafe = base64.urlsafe_b64encode(content).decode()
    assert "+" in plain and "/" in plain and plain.endswith("=")
    return [
        plain,
        lines,
        lines.replace("\n", "\r\n"),
        lines.replace("\n", "\\n"),
        plain.replace("/", "\\/"),
        f"  {plain}\n",
        plain.rstrip("="),
        urlsafe,
        urlsafe.rstrip("="),
        str(plain.encode()),
    ]


def encoded_picture():
    for width in range(4, 99):
        file = io.BytesIO()
        noise = np.random.default_rng(width).integers(0, 255, (3, width, 3), np.uint8)
        PIL.Image.fromarray(noise).save(file, "PNG")
        plain = base64.b64encode(file.getvalue()).decode()
        if "+" in plain and "/" in plain and plain.endswith("="):
            return width, file.getvalue()
    raise AssertionError("no such picture")


def test_base64_in_all_its_forms():
    width, content = encoded_picture()
    headers = ["data:image/png;base64,", "DATA:IMAGE/PNG;BASE64,", "data:;base64,", "data:base64,"]
    headers += ["data:image/png;charset=utf-8;base64,", "data:image/png;name=a.png; base64,"]
    for text in encodings(content):
        assert decode_base64(text) == content
        for header in headers:
            assert decode_base64(header + text) == content
            assert images_lib.load_image(header + text).size == (width, 3)
    quoted = "data:image/png;base64," + urllib.parse.quote(encodings(content)[1])
    assert "%0A" in quoted
    assert images_lib.load_image(quoted).size == (width, 3)


@pytest.mark.parametrize("text", ["a", "abcde", "ab=c", "é" * 400, "ab*d" * 10**5])
def test_what_is_not_base64(text):
    with pytest.raises(UserError, match="not valid base64") as error:
        decode_base64(text)
    assert len(str(error.value)) < 250


def test_base64_as_a_path_is_named_and_not_printed():
    text = base64.b64encode(png_with()).decode() * 400
    with pytest.raises(UserError, match=r"cannot open the picture .*looks like base64") as error:
        images_lib.load_image(text)
    assert len(str(error.value)) < 500
