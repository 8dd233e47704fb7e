"""What a user asks for, from flags or JSON: a conversation and its images."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vl2jax.common.errors import UserError
from vl2jax.data.formats import TURN_KEYS, read_question
from vl2jax.processing.image import URL_SCHEMES

CONVERSATION_KEYS = ("messages", "conversation", "conversations", "prompt")
_ANSWERS = ("assistant", "<|Assistant|>")  # roles


@dataclasses.dataclass(frozen=True)
class Request:
    """One conversation to answer.

    Attributes:
      conversation: messages as `prompt.read_conversation` takes them.
      images: sources of its images; None where the messages name them.
      add_placeholders: whether a last message without a placeholder is about all the images.
    """

    conversation: Any
    images: list[Any] | None = None
    add_placeholders: bool = False


def from_prompt(prompt: str, images: Sequence[Any] = (), *, system: str | None = None) -> Request:
    """A single question; placeholders for the images are put in front if it has none.

    Raises:
      UserError: there is neither text nor image.
    """
    if not prompt.strip() and not images:
        raise UserError("the prompt is empty; expected a question, an image or both")
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    return Request(messages, list(images), add_placeholders=True)


def read_request(path: Path) -> Request:
    """Reads a conversation from a JSON file.

    Raises:
      UserError: not JSON, or not a conversation.
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
      folder: where image paths lead that lead nowhere from the current directory.

    Raises:
      UserError: not JSON, or not a conversation.
    """
    return _conversation(_parsed(text), folder)


def parse_question(text: bytes, folder: Path) -> Request:
    """Reads a row that is to be answered: what `parse_request` reads, or a row of training data in
    LLaVA's or ms-swift's form.  An answer that it ends with is left out.

    Args as of `parse_request`; images of training data lie in `folder`.

    Raises:
      UserError: not JSON, not a conversation, or nothing is asked.
    """
    value = _parsed(text)
    if _is_training_row(value):
        row = read_question(value, root=folder)
        return Request(list(row.messages), list(row.images))
    request = _conversation(value, folder)
    turns = request.conversation
    if isinstance(turns, list) and len(turns) > 1 and _role(turns[-1]) in _ANSWERS:
        return dataclasses.replace(request, conversation=turns[:-1])
    return request


def _is_training_row(value: Any) -> bool:
    """Whether a row is in a form that only training data has."""
    if not isinstance(value, Mapping):
        return False
    turns = next((value[key] for key in TURN_KEYS if isinstance(value.get(key), list)), [])
    has_from = any(isinstance(turn, Mapping) and "from" in turn for turn in turns)
    return has_from or any(value.get(key) for key in ("system", "objects"))


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from error


def _conversation(value: Any, folder: Path) -> Request:
    if isinstance(value, list):
        return Request(_with_folder(value, folder))
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
    return Request(_with_folder(value[keys[0]], folder), images)


def _images(value: Mapping[str, Any], folder: Path) -> list[Any] | None:
    """The images that stand beside a conversation, if any are given there."""
    if "images" in value and "image" in value:
        raise UserError("'image' and 'images' are both given; give one of them")
    images = value.get("images", value.get("image"))
    if images is None:
        return None
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"'images' must be a list of paths, got {images!r:.80}")
    return [locate(image, folder) for image in images]


def locate(source: Any, folder: Path) -> Any:
    """A path as it is if it leads somewhere from here, else from `folder`; URLs as they are."""
    if not isinstance(source, str) or source.lower().startswith(URL_SCHEMES):
        return source
    try:
        if not Path(source).exists() and (folder / source).exists():
            return str(folder / source)
    except (OSError, ValueError):  # no path at all; opening it gives the reason
        pass
    return source


def _with_folder(conversation: Any, folder: Path) -> Any:
    """The conversation with the image paths of its messages located; odd things stay."""
    if not isinstance(conversation, list):
        return conversation
    return [_message(message, folder) for message in conversation]


def _message(message: Any, folder: Path) -> Any:
    if not isinstance(message, Mapping):
        return message
    message = dict(message)
    if isinstance(message.get("images"), list):
        message["images"] = [locate(image, folder) for image in message["images"]]
    if isinstance(message.get("content"), list):
        message["content"] = [_part(part, folder) for part in message["content"]]
    return message


def _part(part: Any, folder: Path) -> Any:
    if not isinstance(part, Mapping):
        return part
    part = _located(part, ("image", "path", "url", "image_url"), folder)
    for key in ("image", "image_url"):
        if isinstance(part.get(key), Mapping):
            part[key] = _located(part[key], ("url",), folder)
    return part


def _located(value: Mapping, keys: Iterable[str], folder: Path) -> dict:
    return {k: locate(v, folder) if k in keys else v for k, v in value.items()}
