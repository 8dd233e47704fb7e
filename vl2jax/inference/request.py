"""Requests: a conversation and its images, from command-line flags or JSON."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vl2jax.common.errors import UserError
from vl2jax.data.formats import TURN_KEYS, read_question
from vl2jax.processing.image import URL_SCHEMES

CONVERSATION_KEYS = ("messages", "conversation", "conversations", "prompt")
_ANSWERS = ("assistant", "<|Assistant|>")  # roles of answers


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


def read_request(path: Path) -> Request:
    """Reads a conversation from a JSON file.

    Raises:
      UserError: the file is not JSON, or has no conversation.
      OSError: the file cannot be read.
    """
    try:
        return parse_request(path.read_bytes(), path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_request(text: bytes, folder: Path) -> Request:
    """Reads a conversation from JSON: a list of messages, or an object with one of
    `CONVERSATION_KEYS` and optionally `images` (or `image`).

    Args:
      text: the JSON.
      folder: folder of image paths that do not exist relative to the current directory.

    Raises:
      UserError: the text is not JSON, or has no conversation.
    """
    return _parse_conversation(_parse_json(text), folder)


def parse_question(text: bytes, folder: Path) -> Request:
    """Reads a question from JSON, for answering a file of requests or training data.

    Besides the forms of `parse_request`, it reads rows of training data in the formats of LLaVA and
    ms-swift.  If the conversation ends with an answer, that answer is removed.

    Args:
      text: the JSON.
      folder: see `parse_request`; image paths of training data are relative to it.

    Raises:
      UserError: the text is not JSON, or has no conversation or no question.
    """
    value = _parse_json(text)
    if _is_training_row(value):
        row = read_question(value, root=folder)
        return Request(list(row.messages), list(row.images))
    request = _parse_conversation(value, folder)
    turns = request.conversation
    if isinstance(turns, list) and len(turns) > 1 and _role(turns[-1]) in _ANSWERS:
        return dataclasses.replace(request, conversation=turns[:-1])
    return request


def _is_training_row(value: Any) -> bool:
    """Whether a row has a format that only training data has."""
    if not isinstance(value, Mapping):
        return False
    turns = next((value[key] for key in TURN_KEYS if isinstance(value.get(key), list)), [])
    has_from = any(isinstance(turn, Mapping) and "from" in turn for turn in turns)
    return has_from or any(value.get(key) for key in ("system", "objects"))


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _parse_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from error


def _parse_conversation(value: Any, folder: Path) -> Request:
    if isinstance(value, list):
        return Request(_resolve_paths(value, folder))
    if not isinstance(value, Mapping):
        raise UserError(
            "expected a list of messages or an object with 'messages' or 'prompt',"
            f" got {type(value).__name__}"
        )
    keys = [key for key in CONVERSATION_KEYS if key in value]
    if len(keys) != 1:
        raise UserError(
            f"expected exactly one of {', '.join(map(repr, CONVERSATION_KEYS))},"
            f" got {keys or sorted(value)[:8]}"
        )
    images = _images(value, folder)
    if keys == ["prompt"]:
        if not isinstance(value["prompt"], str):
            raise UserError(f"'prompt' must be a text, got {type(value['prompt']).__name__}")
        return from_prompt(value["prompt"], images or ())
    return Request(_resolve_paths(value[keys[0]], folder), images)


def _images(value: Mapping[str, Any], folder: Path) -> list[Any] | None:
    """Images given next to a conversation, not in its messages; None if there are none."""
    if "images" in value and "image" in value:
        raise UserError("'image' and 'images' are both given; give one of them")
    images = value.get("images", value.get("image"))
    if images is None:
        return None
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"'images' must be a list of paths, got {images!r:.80}")
    return [resolve_path(image, folder) for image in images]


def resolve_path(source: Any, folder: Path) -> Any:
    """Resolves an image path against `folder` if it does not exist in the current directory.

    Args:
      source: a path; URLs and other sources are returned unchanged.
      folder: the folder.
    """
    if not isinstance(source, str) or source.lower().startswith(URL_SCHEMES):
        return source
    try:
        if not Path(source).exists() and (folder / source).exists():
            return str(folder / source)
    except (OSError, ValueError):  # not a valid path; the error is reported when it is opened
        pass
    return source


def _resolve_paths(conversation: Any, folder: Path) -> Any:
    """Resolves the image paths in messages against `folder`; keeps malformed parts unchanged."""
    if not isinstance(conversation, list):
        return conversation
    return [_resolve_message(message, folder) for message in conversation]


def _resolve_message(message: Any, folder: Path) -> Any:
    if not isinstance(message, Mapping):
        return message
    message = dict(message)
    if isinstance(message.get("images"), list):
        message["images"] = [resolve_path(image, folder) for image in message["images"]]
    if isinstance(message.get("content"), list):
        message["content"] = [_resolve_part(part, folder) for part in message["content"]]
    return message


def _resolve_part(part: Any, folder: Path) -> Any:
    if not isinstance(part, Mapping):
        return part
    part = _resolve_keys(part, ("image", "path", "url", "image_url"), folder)
    for key in ("image", "image_url"):
        if isinstance(part.get(key), Mapping):
            part[key] = _resolve_keys(part[key], ("url",), folder)
    return part


def _resolve_keys(value: Mapping, keys: Iterable[str], folder: Path) -> dict:
    return {k: resolve_path(v, folder) if k in keys else v for k, v in value.items()}
