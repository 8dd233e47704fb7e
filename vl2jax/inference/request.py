"""Requests: a conversation and its images, from command-line flags or a file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl2jax.common.errors import UserError, reason
from vl2jax.data.formats import read_question
from vl2jax.data.row import Row


@dataclasses.dataclass(frozen=True)
class Request:
    """One conversation to answer.

    Attributes:
      conversation: messages, in a form that `processing.prompt.read_conversation` reads.
      images: sources of its images; None: the messages name them.
      add_placeholders: whether to add placeholders for all images to the last message if it has
        none.
    """

    conversation: Any
    images: list[Any] | None = None
    add_placeholders: bool = False


def from_prompt(prompt: str, images: Sequence[Any] = (), *, system: str | None = None) -> Request:
    """Makes a request of one question, preceded by placeholders for the images if it has none.

    Args:
      prompt: the question.
      images: sources of its images.
      system: system message.

    Raises:
      UserError: there is neither text nor an image.
    """
    if not prompt.strip() and not images:
        raise UserError("the prompt is empty; expected a question, an image or both")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return Request(messages, list(images), add_placeholders=True)


def from_row(row: Row) -> Request:
    """Makes a request of a row that `data.formats.read_question` has read."""
    return Request(list(row.messages), list(row.images))


def read_request(path: Path, images: Sequence[str] = ()) -> Request:
    """Reads a conversation from a file, in any format of training data.

    An answer at its end is kept, so that the model continues it.

    Args:
      path: the file.
      images: paths of images, for a conversation that names none.

    Raises:
      UserError: the file is not JSON, or has no conversation, or it has images, too.
      OSError: the file cannot be read.
    """
    # Paths of images in the file are relative to it, those of flags to the current directory.
    options: Any = {"folders": [path.parent, Path()], "images": images, "keep_answer": True}
    try:
        return from_row(read_question(_parse_json(path.read_bytes()), where="", **options))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_question(text: bytes, folder: Path) -> Request:
    """Reads a question from JSON, without the answer at its end.

    Args:
      text: the JSON, a row in any format of training data.
      folder: folder of relative image paths; the current directory comes second.

    Raises:
      UserError: the text is not JSON, or has no conversation or no question.
    """
    return from_row(read_question(_parse_json(text), where="", folders=[folder, Path()]))


def _parse_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({reason(error)})") from error
