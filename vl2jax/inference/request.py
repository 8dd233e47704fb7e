"""Requests: a conversation and its images, from command-line flags or a file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl2jax.common.errors import UserError
from vl2jax.data.file_source import FileSource
from vl2jax.data.files import open_rows
from vl2jax.data.formats import read_question


@dataclasses.dataclass(frozen=True)
class Request:
    """One conversation to answer.

    Attributes:
      conversation: messages, in a form that `processing.prompt.read_conversation` reads.
      images: sources of its images; None: the messages name them.
      add_placeholders: whether to add placeholders for all images to the last message if it has
        none.
      unread: keys of its row that were not read.
    """

    conversation: Any
    images: list[Any] | None = None
    add_placeholders: bool = False
    unread: tuple[str, ...] = ()


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


def read_request(path: Path, images: Sequence[str] = ()) -> Request:
    """Reads a conversation from a file with a single row, in any format of training data.

    An answer at its end is kept, so that the model continues it.

    Args:
      path: the file.
      images: paths of images, for a conversation that names none.

    Raises:
      UserError: the file has no conversation or several, or it has images, too.
    """
    rows = open_rows(path)
    if len(rows) != 1:
        raise UserError(f"{path} has {len(rows)} rows; expected one conversation, or use --batch")
    try:
        return read_question_at(rows, 0, images=images, keep_answer=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_question_at(
    rows: FileSource, index: int, *, images: Sequence[str] = (), keep_answer: bool = False
) -> Request:
    """Reads one row of a file as a question.

    Args:
      rows: the file; relative paths of images begin at its folder, then at the current directory.
      index: number of the row, from 0.
      images: more images, for a row that has none.
      keep_answer: whether to keep an answer at the end, so that the model continues it.

    Raises:
      UserError: the row cannot be read, or has no question; the message does not name it.
    """
    row = read_question(
        rows.value(index),
        where="",
        folders=[rows.root, Path()],
        images=images,
        keep_answer=keep_answer,
    )
    return Request(list(row.messages), list(row.images), unread=row.unread)
