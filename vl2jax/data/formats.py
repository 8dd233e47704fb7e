"""Converts a row of a data file to a `Row`; the keys of the row decide its format.

- `messages`, `conversations` or `conversation`: a list of turns; or the row itself is that list.  A
  turn is `{"role", "content"}` or `{"from", "value"}` (LLaVA, ShareGPT).  Its content is a text or
  a list of OpenAI's parts, and it may have its own `images` (DeepSeek-VL2).
- `text`, instead of turns: a document, which is supervised as a whole.  A single turn of the
  assistant is a document too.
- `images` or `image`: one image or a list, see `pictures.picture`.
- `system`: a system message outside of the turns (LLaMA-Factory).
- `objects`: names and boxes (ms-swift), see `boxes.fill_objects`.

Keys whose value is null, and other keys, are ignored.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vl2jax.common.errors import UserError
from vl2jax.data.boxes import fill_objects
from vl2jax.data.pictures import picture
from vl2jax.data.row import Row
from vl2jax.processing.image import ImageSource, image_size
from vl2jax.processing.prompt import ASSISTANT, SYSTEM, USER, read_conversation, with_placeholders

PLACEHOLDER = "<image>"
TURN_KEYS = ("messages", "conversations", "conversation")
ROLES = {
    **{"user": USER, "human": USER, "<|User|>": USER},
    **{"assistant": ASSISTANT, "gpt": ASSISTANT, "<|Assistant|>": ASSISTANT},
    **{"system": SYSTEM, "deepseekapi-sys": SYSTEM},
}
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")
_EXPECTED = (
    "expected 'messages' or 'conversations' with turns like {'role': 'user', 'content': '...'} or"
    " {'from': 'human', 'value': '...'}, or a document under 'text'"
)


def read_row(value: Any, *, where: str, root: pathlib.Path) -> Row:
    """Reads a row of any format; checks that image files exist, but does not decode them.

    Args:
      value: the row, as parsed from JSON or Parquet.
      where: name of the row in messages.
      root: folder of relative image paths.

    Returns:
      A document; or a conversation: an optional system message, then alternating turns of the user
      and the assistant, the last one the assistant's.

    Raises:
      UserError: the row is malformed; the message begins with `where`.
    """
    try:
        row = _read(_without_nulls(value), where, root)
        if row.messages:
            _check_turns(row.messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; {_EXPECTED}") from error
    return row


def read_question(value: Any, *, root: pathlib.Path) -> Row:
    """Reads a row of any format as a question for inference, without the answer at its end.

    Args:
      value: the row, as parsed from JSON or Parquet.
      root: folder of relative image paths.

    Returns:
      A conversation as `read_row` returns it, but ending with a turn of the user.

    Raises:
      UserError: the row is malformed or has no question.
    """
    try:
        row = _read(_without_nulls(value), "", root)
    except RecursionError as error:
        raise UserError(f"nested too deeply; {_EXPECTED}") from error
    messages = list(row.messages)
    if messages and messages[-1]["role"] == ASSISTANT:
        messages.pop()
    if not messages or messages[-1]["role"] != USER:
        raise UserError("no turn of the user before the last answer, so nothing is asked")
    _check_order(messages)
    return dataclasses.replace(row, messages=messages)


def _read(value: Any, where: str, root: pathlib.Path) -> Row:
    """Reads a row without checking the order of its turns."""
    row = {"messages": value} if isinstance(value, list) else value
    if not isinstance(row, Mapping):
        raise UserError(f"{_EXPECTED}; got {type(value).__name__}")
    key = _one_key(row, (*TURN_KEYS, "text"), _EXPECTED)
    for other in ("videos", "audios"):
        if row.get(other):
            raise UserError(f"{other!r} are not read; give frames as 'images' or leave the row out")
    given = _given_images(row)
    if key == "text":
        messages, named = [_document(row["text"])], []
    else:
        messages, named = _read_turns(row[key], row.get("system"))
    images = [_named_picture(n, image, root) for n, image in enumerate(_choose(given, named), 1)]
    if given:
        _add_placeholders(messages, len(images))
    _check_count(messages, len(images))
    _fill(messages, row.get("objects"), images)
    if key == "text" or [message["role"] for message in messages] == [ASSISTANT]:
        return Row(text=messages[0]["content"], images=images, where=where)
    return Row(messages=messages, images=images, where=where)


def _document(text: Any) -> dict[str, str]:
    """Represents a document as a single turn of the assistant."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"'text' must be a text that is not empty, got {text!r:.80}")
    return {"role": ASSISTANT, "content": text}


def _read_turns(turns: Any, system: Any) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages with plain text, and the images that they name (None for a part without source)."""
    if not isinstance(turns, list | tuple):
        raise UserError(f"the conversation must be a list of turns, got {type(turns).__name__}")
    entries = [_entry(number, turn) for number, turn in enumerate(turns, 1)]
    if system is not None and system != "":
        if any(entry["role"] == SYSTEM for entry in entries):
            raise UserError("a system message both in the turns and under 'system'; give it once")
        entries.insert(0, {"role": SYSTEM, "content": system})
    if len(entries) == 1 and entries[0]["role"] == ASSISTANT:
        # A document.  It may have images, which only a user's message may, so it is read as one.
        read, named = read_conversation([entries[0] | {"role": USER}], image_token=PLACEHOLDER)
        return [{"role": ASSISTANT, "content": _answer(1, read[0].text)}], named
    read, named = read_conversation(entries, image_token=PLACEHOLDER)
    return [{"role": message.kind, "content": message.text} for message in read], named


def _entry(number: int, turn: Any) -> dict[str, Any]:
    """Converts a turn to a message for `read_conversation`."""
    where = f"message {number}"
    if not isinstance(turn, Mapping):
        raise UserError(
            f"{where}: expected a turn like {{'role': 'user', 'content': '...'}}, got {turn!r:.80}"
        )
    role = turn[_one_key(turn, _ROLE_KEYS, f"{where}: expected one of 'role' and 'from'")]
    content = turn[_one_key(turn, _CONTENT_KEYS, f"{where}: expected one of 'content' and 'value'")]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r:.40}; expected one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    return {"role": ROLES[role], "content": content, "images": turn.get("images", [])}


def _part(part: Any) -> Any:
    """A part of the content; an image that is a record moves to the key `url`."""
    if isinstance(part, Mapping) and isinstance(part.get("image"), Mapping):
        return {"type": "image", "url": part["image"]}
    return part


def _given_images(row: Mapping[str, Any]) -> list[Any]:
    """Images given by the row, outside of its turns."""
    found = [key for key in ("images", "image") if row.get(key) not in (None, [])]
    if len(found) > 1:
        raise UserError("'image' and 'images' are both given; give one of them")
    images = row[found[0]] if found else []
    return list(images) if isinstance(images, list | tuple) else [images]


def _choose(given: list[Any], named: list[Any]) -> list[Any]:
    """All images in order: those given by the row, else those that its turns name."""
    named_count = sum(source is not None for source in named)
    if given and named_count:
        raise UserError("images both in the turns and outside of them; give them in one place")
    if not given and named_count < len(named):
        raise UserError("a part of type image has no source; give it there or under 'images'")
    return given or named


def _named_picture(number: int, value: Any, root: pathlib.Path) -> ImageSource:
    try:
        return picture(value, root)
    except UserError as error:
        raise UserError(f"image {number}: {error}") from error


def _add_placeholders(messages: list[dict[str, str]], images: int) -> None:
    """Prepends all placeholders to the first question or document, if no text has any."""
    if any(PLACEHOLDER in message["content"] for message in messages):
        return
    first = next((message for message in messages if message["role"] == USER), messages[0])
    first["content"] = with_placeholders(first["content"], images, PLACEHOLDER)


def _check_count(messages: Sequence[Mapping[str, str]], images: int) -> None:
    count = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if count != images:
        raise UserError(
            f"{count} {PLACEHOLDER} in the text but {images} images; give one image for each, in"
            " order"
        )


def _fill(messages: list[dict[str, str]], objects: Any, images: list[ImageSource]) -> None:
    texts = [message["content"] for message in messages]
    filled = fill_objects(texts, objects, len(images), lambda number: image_size(images[number]))
    for message, text in zip(messages, filled, strict=True):
        message["content"] = text


def _check_turns(messages: Sequence[Mapping[str, str]]) -> None:
    """Raises UserError unless non-empty questions and answers alternate and an answer is last."""
    if not any(message["role"] == ASSISTANT for message in messages):
        raise UserError("no turn of the assistant, so nothing to learn; add its answer")
    _check_order(messages)
    if messages[-1]["role"] != ASSISTANT:
        raise UserError(
            f"message {len(messages)}: the conversation ends with role {messages[-1]['role']!r};"
            " for training the last turn must be the assistant's: add it or drop the question"
        )


def _check_order(messages: Sequence[Mapping[str, str]]) -> None:
    """Raises UserError unless non-empty questions and answers alternate."""
    first = int(messages[0]["role"] == SYSTEM)
    for place, (number, message) in enumerate(list(enumerate(messages, 1))[first:]):
        expected = (USER, ASSISTANT)[place % 2]
        if message["role"] != expected:
            raise UserError(
                f"message {number}: role {message['role']!r} where {expected!r} is due; turns"
                " alternate, beginning with the user"
            )
        if expected == ASSISTANT:
            _answer(number, message["content"])
        elif not message["content"]:
            raise UserError(
                f"message {number}: empty question; for text without one use {{'text': '...'}}"
            )


def _answer(number: int, text: str) -> str:
    if not text:
        raise UserError(f"message {number}: empty answer; write it or leave the row out")
    return text


def _one_key(value: Mapping[str, Any], keys: Sequence[str], expected: str) -> str:
    found = [key for key in keys if key in value]
    if len(found) != 1:
        got = f"{found} together" if found else f"the keys {sorted(map(str, value))[:8]}"
        raise UserError(f"{expected}; got {got}")
    return found[0]


def _without_nulls(value: Any) -> Any:
    """Removes keys that are null, at any depth, because Parquet adds all keys to all rows."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value
