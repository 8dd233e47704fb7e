"""Writes answers to standard output as text or JSON, and draws their boxes on an image."""

import json
import sys
from pathlib import Path
from typing import Any

import PIL.Image

from vl2jax.common.errors import UserError
from vl2jax.inference.generate import Generation
from vl2jax.processing import grounding
from vl2jax.processing.collate import Sample
from vl2jax.processing.image import load_image

# Control characters are shown as symbols, so that an answer cannot control the terminal.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Output:
    """Writes answers, and nothing else, to standard output; draws their boxes on an image."""

    def __init__(
        self,
        *,
        as_json: bool,
        stream: bool,
        draw: Path | None = None,
        draw_on: int | None = None,
        exif: bool = True,
    ):
        """
        Args:
          as_json: whether to print one JSON object per answer instead of its text.
          stream: whether to print text while it is generated.
          draw: path of the image with boxes to write; None: none.
          draw_on: number of the image (from 1) that the boxes refer to; None: the last.
          exif: whether images are rotated as their EXIF orientation says.
        """
        self._as_json, self._streams = as_json, stream and not as_json
        self._draw, self._draw_on, self._exif = draw, draw_on, exif

    def check(self, sample: Sample) -> None:
        """Raises UserError if boxes could not be drawn on the requested image of `sample`."""
        images = len(sample.image_sizes)
        if self._draw is None and self._draw_on is None:
            return
        if not images:
            raise UserError("boxes need an image to be drawn on; the conversation has none")
        if not 1 <= (self._draw_on or images) <= images:
            raise UserError(
                f"--draw_on {self._draw_on}: the conversation has {images} images; expected 1 to"
                f" {images}"
            )

    def show(self, text: str) -> None:
        """Prints new text of an answer, if streaming."""
        if self._streams and text:
            print(_printable(text), end="", flush=True)

    def finish(self, generation: Generation, sample: Sample) -> None:
        """Prints the complete answer, or the end of a streamed one, and draws its boxes.

        Raises:
          UserError: the answer ended with an error.
        """
        text = generation.text or ""  # a session always has a tokenizer
        if self._as_json:
            print(json_line(record(generation, sample, self._draw_on)), flush=True)
        else:
            print("" if self._streams else _printable(text), flush=True)
        if generation.error is not None:
            raise UserError(generation.error)
        if self._draw is not None:
            found = grounding.parse_answer(text, sample.image_sizes, self._draw_on)
            source = sample.image_sources[-1 if self._draw_on is None else self._draw_on - 1]
            picture = load_image(source, exif=self._exif)
            grounding.draw(picture, found.boxes).save(self._draw)
            print(f"{self._draw}: {grounding.summary(found)}", file=sys.stderr)

    def interrupt(self) -> None:
        """Ends the line of an interrupted answer."""
        if self._streams:
            print(flush=True)


def _printable(text: str) -> str:
    """Makes text safe for a terminal; returns it unchanged if the output is not a terminal."""
    return text.translate(_VISIBLE) if sys.stdout.isatty() else text


def record(generation: Generation, sample: Sample, draw_on: int | None = None) -> dict[str, Any]:
    """Converts an answer to a JSON object; it has an `error` if the answer ended with one.

    Args:
      generation: the answer.
      sample: its prompt.
      draw_on: number of the image (from 1) for whose pixels `boxes` are computed; None: the last.
    """
    found = grounding.parse_answer(generation.text or "", sample.image_sizes, draw_on)
    error = {} if generation.error is None else {"error": {"message": generation.error}}
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "image_tokens": sum(sample.image_tokens),
        "boxes": [{"label": box.label, "box": list(box.xyxy)} for box in found.boxes],
        "boxes_refused": list(found.refused),
        "seconds_to_first_token": round(generation.seconds_to_first_token, 4),
        "tokens_per_second": round(generation.tokens_per_second, 2),
        **error,
    }


def json_line(value: dict[str, Any]) -> str:
    """Encodes JSON on one line, with non-ASCII characters as they are."""
    return json.dumps(value, ensure_ascii=False)


def check_drawing(path: Path) -> None:
    """Raises UserError unless an image can be written to `path`."""
    PIL.Image.init()
    kind = PIL.Image.registered_extensions().get(path.suffix.lower())
    if kind not in PIL.Image.SAVE:
        raise UserError(f"--draw {path}: unknown image format; use .png or .jpg")
    check_folder("--draw", path)


def check_folder(flag: str, path: Path) -> None:
    """Raises UserError unless a file can be created, or is already, at `path`."""
    if path.is_dir():
        what = "is a directory"
    elif path.exists() and not path.is_file():
        what = "is a device or a pipe"  # of which what was written before cannot be read
    elif not path.parent.is_dir():
        what = f"there is no directory {path.parent}"
    else:
        return
    raise UserError(f"{flag} {path}: {what}; expected the path of a file to write")
