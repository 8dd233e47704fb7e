"""Images: loading, choice of the resolution, padding, tiling, and the layout of visual tokens.

Dynamic tiling is described in DeepSeek-VL2, section 2.

Axis legend: S pixels per tile side, Q visual tokens per tile, n views of one image.
"""

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import IO, Any, TypeVar

import numpy as np
import PIL.Image

from vl2jax.common.errors import UserError, reason
from vl2jax.common.json_file import HEAD, not_downloaded
from vl2jax.processing.batch import FIRST_TILE_ROW, IMAGE_NEWLINE, VIEW_SEPERATOR
from vl2jax.processing.image_source import (
    ImageSource,
    has_metadata,
    open_source,
    without_texts,
)

T = TypeVar("T")

# Pillow's default threshold, 256 MiB as RGB.  A small file can decode to more and fill the memory.
MAX_PIXELS = 89_478_485
MEAN_COLOUR = (127, 127, 127)  # int(0.5 * 255), the released mean, which is the only supported one

# Formats that Pillow decodes itself; for some others it starts external programs.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# Formats whose header has the final size; other formats may change it while decoding.
_HEADER_TELLS_SIZE = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "PPM")
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_TRANSPOSES = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
# `warnings` state is global to the process, so threads read headers one at a time.
_HEADER_LOCK = threading.Lock()


def load_image(source: ImageSource, *, exif: bool = True) -> PIL.Image.Image:
    """Loads an image and converts it to RGB; alpha is dropped and 16-bit gray is clipped.

    Args:
      source: a path, a `file://` or base64 `data:` URL, the bytes of a file, or a PIL image.  A PIL
        image is only converted to RGB; its EXIF orientation is ignored.
      exif: whether to apply the EXIF orientation; the original does not.

    Returns:
      The first frame, mode RGB.

    Raises:
      UserError: the source cannot be opened, is not an image, is truncated, is empty, or has more
        than `MAX_PIXELS` pixels.
    """

    def load(name: str, opened: Any) -> PIL.Image.Image:
        if isinstance(opened, PIL.Image.Image):
            _check_pixels(opened.size, name)
            return _to_rgb(opened)
        image = _read_header(name, opened)
        image.load()
        orientation = _orientation(image) if exif else 1
        image = _to_rgb(image)
        return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image

    return _decode(source, load)


def image_size(source: ImageSource, *, exif: bool = True) -> tuple[int, int]:
    """Returns the size of the image that `load_image` returns; mostly reads only the header.

    Args:
      source: see `load_image`.
      exif: see `load_image`.

    Returns:
      (width, height) in pixels.

    Raises:
      UserError: as `load_image`, except for damage that is only found by decoding.
    """

    def size(name: str, opened: Any) -> tuple[int, int]:
        if isinstance(opened, PIL.Image.Image):
            _check_pixels(opened.size, name)
            return opened.size
        image = _read_header(name, opened)
        if image.format not in _HEADER_TELLS_SIZE:
            image.load()
        width, height = image.size
        sideways = exif and _may_be_turned(image, opened) and _orientation(image) in _SIDEWAYS
        return (height, width) if sideways else (width, height)

    return _decode(source, size)


def select_best_resolution(
    size: tuple[int, int], candidates: Iterable[tuple[int, int]]
) -> tuple[int, int]:
    """Chooses the canvas that keeps the most pixels of an image, then the one with least padding.

    The floating-point scale and the truncation are part of the original's definition: exact
    arithmetic chooses another canvas for some sizes, for example (1523, 2285).

    Args:
      size: (width, height) of the image.
      candidates: (width, height) of each canvas; the first of equal candidates is chosen.

    Returns:
      (width, height) of the chosen canvas.
    """
    width, height = size
    best, best_kept, best_wasted = None, 0, float("inf")
    for canvas_width, canvas_height in candidates:
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_width * canvas_height - kept
        if kept > best_kept or (kept == best_kept and wasted < best_wasted):
            best, best_kept, best_wasted = (canvas_width, canvas_height), kept, wasted
    assert best is not None  # a configuration has candidates
    return best


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Returns the size of an image that is resized to fit a canvas, keeping its aspect ratio.

    Args:
      size: (width, height) of the image.
      canvas: (width, height) of the canvas.

    Returns:
      (width, height), each at least 1.
    """
    width, height = size
    ratio, canvas_ratio = width / height, canvas[0] / canvas[1]
    if ratio > canvas_ratio:
        return canvas[0], max(1, round(height / width * canvas[0]))
    if ratio < canvas_ratio:
        return max(1, round(width / height * canvas[1])), canvas[1]
    return canvas


def pad_to(image: PIL.Image.Image, canvas: tuple[int, int]) -> PIL.Image.Image:
    """Resizes an image (bicubic) and centres it on a canvas of the mean colour.

    Does the same as `PIL.ImageOps.pad`, except that no side becomes shorter than one pixel.

    Args:
      image: mode RGB.
      canvas: (width, height) of the result.
    """
    width, height = fitted_size(image.size, canvas)
    resized = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    if (width, height) == canvas:
        return resized
    padded = PIL.Image.new("RGB", canvas, MEAN_COLOUR)
    padded.paste(resized, (round((canvas[0] - width) * 0.5), round((canvas[1] - height) * 0.5)))
    return padded


def make_views(image: PIL.Image.Image, canvas: tuple[int, int], side: int) -> np.ndarray:
    """Makes the global view and the tiles of an image (DeepSeek-VL2, section 2, dynamic tiling).

    Args:
      image: mode RGB.
      canvas: (width, height) of the local view, multiples of `side`.
      side: S.

    Returns:
      uint8[n, S, S, 3], n = 1 + number of tiles: the global view, then the tiles row by row.
    """
    overview = np.asarray(pad_to(image, (side, side)), np.uint8)
    local = np.asarray(pad_to(image, canvas), np.uint8)
    columns, rows = canvas[0] // side, canvas[1] // side
    tiles = local.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return np.concatenate([overview[None], tiles.reshape(-1, side, side, 3)])


def image_tokens(tiles_wide: int, tiles_high: int, tile_grid: int) -> int:
    """Returns the number of tokens of an image.

    They are the visual tokens of both views, a newline after each of their rows, and the separator.

    Args:
      tiles_wide: columns of tiles.
      tiles_high: rows of tiles.
      tile_grid: visual tokens per tile side.
    """
    overview = tile_grid * (tile_grid + 1)
    local = tiles_high * tile_grid * (tiles_wide * tile_grid + 1)
    return overview + 1 + local


def image_layout(
    tiles_wide: int,
    tiles_high: int,
    tile_grid: int,
    *,
    first_slot: int = 0,
    global_view_pos: str = "head",
) -> np.ndarray:
    """Lays out the tokens of an image: values of `Batch.image_index`, in the order of the tokens.

    Args:
      tiles_wide: columns of tiles.
      tiles_high: rows of tiles.
      tile_grid: visual tokens per tile side, the square root of Q.
      first_slot: tile slot of the image's global view; its tiles follow row by row.
      global_view_pos: "head" (global, separator, local) or "tail" (local, separator, global).

    Returns:
      int32[image_tokens(...)].
    """
    views = 1 + tiles_wide * tiles_high
    first = FIRST_TILE_ROW + first_slot * tile_grid**2
    rows = first + np.arange(views * tile_grid**2, dtype=np.int32).reshape(
        views, tile_grid, tile_grid
    )
    stitched = rows[1:].reshape(tiles_high, tiles_wide, tile_grid, tile_grid).swapaxes(1, 2)
    overview = _with_newlines(rows[0])
    local = _with_newlines(stitched.reshape(tiles_high * tile_grid, tiles_wide * tile_grid))
    separator = np.array([VIEW_SEPERATOR], np.int32)
    ordered = (
        (overview, separator, local) if global_view_pos == "head" else (local, separator, overview)
    )
    return np.concatenate(ordered)


def _with_newlines(rows: np.ndarray) -> np.ndarray:
    """Appends the index of the newline to each row of int32[h, w] and flattens the result."""
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=IMAGE_NEWLINE).ravel()


def _decode(source: ImageSource, work: Callable[[str, Any], T]) -> T:
    """Calls `work` with the name of a source and its open file (or the image that it is)."""
    if isinstance(source, PIL.Image.Image):
        return work("PIL image", source)
    name, file = open_source(source)
    with file:
        while True:
            try:
                return work(name, file)
            except UserError:
                raise
            except Exception as error:  # decoders raise exceptions of any type for damaged files
                if (message := _reading_failed(error)) is None:
                    bare = without_texts(file)
                    if bare is not None:
                        file = bare  # which has no more texts
                        continue
                    message = _what_is_wrong(error, file)
                raise UserError(f"{name}: {message}") from error


def _reading_failed(error: Exception) -> str | None:
    """What to say if the file could not be read; None if it cannot be decoded."""
    failed = isinstance(error, OSError) and error.errno is not None
    return f"cannot read the picture ({reason(error)})" if failed else None


def _what_is_wrong(error: Exception, file: IO[bytes]) -> str:
    """What to say about a file that cannot be decoded."""
    file.seek(0)
    if found := not_downloaded(file.read(HEAD)):
        return found
    if isinstance(error, PIL.UnidentifiedImageError):
        return (
            "not a picture in a supported format (JPEG, PNG, WebP, GIF, ...); check the content of"
            " the file, its name does not matter"
        )
    return f"damaged or truncated picture ({reason(error)}); get it again"


def _read_header(name: str, file: IO[bytes]) -> PIL.Image.Image:
    """Opens an image without decoding it."""
    with _HEADER_LOCK, warnings.catch_warnings():
        # The size is checked below, and odd metadata does no harm.
        warnings.simplefilter("ignore")
        try:
            PIL.Image.init()
            image = PIL.Image.open(file, formats=[f for f in _FORMATS if f in PIL.Image.OPEN])
        except PIL.Image.DecompressionBombError as error:
            raise UserError(f"{name}: {error}; {_BOMB_ADVICE}") from error
        _check_pixels(image.size, name)
    return image


_BOMB_ADVICE = f"at most {MAX_PIXELS:,} pixels are decoded; make the picture smaller"


def _check_pixels(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width} x {height} pixels; {_BOMB_ADVICE}")
    if width * height == 0:
        raise UserError(f"{name}: the picture is empty ({width} x {height} pixels)")


def _may_be_turned(image: PIL.Image.Image, file: IO[bytes]) -> bool:
    """Whether a file may have an EXIF orientation; Pillow would decode a PNG to see that."""
    if image.format != "PNG" or {"exif", "Raw profile type exif"} & image.info.keys():
        return True
    place = file.tell()
    found = has_metadata(file)
    file.seek(place)
    return found


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if the metadata cannot be read."""
    with _HEADER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return image.getexif().get(_EXIF_ORIENTATION, 1)
        except Exception:  # whatever the decoder raises, the pixels are whole
            return 1


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Converts to RGB as `convert("RGB")`, without its warning about transparent palettes."""
    if image.mode == "RGB":
        return image
    if "transparency" in image.info:
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")
