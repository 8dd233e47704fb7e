"""One row of a data file becomes a `Row`, whichever of the usual formats it is in.

The keys decide, no flag does:

- turns under `messages`, `conversations` or `conversation`, or the row itself a list of turns;
  a turn is `{"role", "content"}` or `{"from", "value"}` (LLaVA, ShareGPT), with content a text or
  OpenAI's parts, and may have its own `images` (the original);
- or a document under `text`, all of it supervised; so is a single turn of the assistant;
- pictures under `images` or `image`: one or a list, see `pictures.picture`;
- `system`: a system message beside the turns (LLaMA-Factory);
- `objects`: names and boxes in pixels (ms-swift), see `boxes.fill_objects`.

A key whose value is null counts as absent; other keys mean nothing.
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
    """Reads a row of any format; pictures are looked for, but not decoded.

    Args:
      value: what JSON or parquet gives.
      where: how a message names the row.
      root: where relative image paths begin.

    Returns:
      Turns of the user and the assistant in alternation, the assistant's last, after at most one
      system message; or a document.

    Raises:
      UserError: a malformed row; the message begins with `where`.
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
    """Reads a row of any format as a question to be answered: the answer at its end is left out.

    Args as of `read_row`.

    Raises:
      UserError: a malformed row, or one that asks nothing.
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
    """A row whose turns may come in any order."""
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
    """A document as if it were one turn of the assistant."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"'text' must be a text that is not empty, got {text!r:.80}")
    return {"role": ASSISTANT, "content": text}


def _read_turns(turns: Any, system: Any) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages with text alone, and the pictures that they name, None for one without a source."""
    if not isinstance(turns, list | tuple):
        raise UserError(f"the conversation must be a list of turns, got {type(turns).__name__}")
    entries = [_entry(number, turn) for number, turn in enumerate(turns, 1)]
    if system is not None and system != "":
        if any(entry["role"] == SYSTEM for entry in entries):
            raise UserError("a system message both beside the turns and among them; give it once")
        entries.insert(0, {"role": SYSTEM, "content": system})
    if len(entries) == 1 and entries[0]["role"] == ASSISTANT:
        # A document: there alone an assistant's text may have pictures, so it is read as a user's.
        read, named = read_conversation([entries[0] | {"role": USER}], image_token=PLACEHOLDER)
        return [{"role": ASSISTANT, "content": _answer(1, read[0].text)}], named
    read, named = read_conversation(entries, image_token=PLACEHOLDER)
    return [{"role": message.kind, "content": message.text} for message in read], named


def _entry(number: int, turn: Any) -> dict[str, Any]:
    """A turn as `read_conversation` takes it."""
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
    """A part of the content; one whose image is a record gets it where a source belongs."""
    if isinstance(part, Mapping) and isinstance(part.get("image"), Mapping):
        return {"type": "image", "url": part["image"]}
    return part


def _given_images(row: Mapping[str, Any]) -> list[Any]:
    """The pictures that stand beside the turns."""
    found = [key for key in ("images", "image") if row.get(key) not in (None, [])]
    if len(found) > 1:
        raise UserError("'image' and 'images' are both given; give one of them")
    images = row[found[0]] if found else []
    return list(images) if isinstance(images, list | tuple) else [images]


def _choose(given: list[Any], named: list[Any]) -> list[Any]:
    """The pictures in order: those beside the turns, or those that the turns name."""
    named_count = sum(source is not None for source in named)
    if given and named_count:
        raise UserError("pictures both beside the turns and among them; give them in one place")
    if not given and named_count < len(named):
        raise UserError("a part of type image has no source; give it, or 'images' beside the turns")
    return given or named


def _named_picture(number: int, value: Any, root: pathlib.Path) -> ImageSource:
    try:
        return picture(value, root)
    except UserError as error:
        raise UserError(f"image {number}: {error}") from error


def _add_placeholders(messages: list[dict[str, str]], images: int) -> None:
    """Puts all pictures in front of the first question, or the document, if no text has any."""
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
    """Raises UserError unless question and answer alternate, none empty, the answer last."""
    if not any(message["role"] == ASSISTANT for message in messages):
        raise UserError("no turn of the assistant, so nothing to learn; add its answer")
    _check_order(messages)
    if messages[-1]["role"] != ASSISTANT:
        raise UserError(
            f"message {len(messages)}: the conversation ends with role {messages[-1]['role']!r};"
            " for training the last turn must be the assistant's: add it or drop the question"
        )


def _check_order(messages: Sequence[Mapping[str, str]]) -> None:
    """Raises UserError unless question and answer alternate, none empty."""
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
    """The value without keys that have null, at any depth: parquet gives all keys to all rows."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value
