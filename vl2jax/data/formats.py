"""Converts a row of a data file to a `Row`; the keys of the row decide its format.

- `messages`, `conversations` or `conversation`: a list of turns; or the row itself is that list.  A
  turn is `{"role", "content"}` or `{"from", "value"}` (LLaVA, ShareGPT).  Its content is a text or
  a list of OpenAI's parts, and it may have its own `images` (DeepSeek-VL2).  `"loss": false`
  (ms-swift) or `"weight": 0` (OpenAI) leaves a turn out of the targets.
- `prompt`: one question, or a list of turns.
- `texts`: questions and answers, `{"user", "assistant"}` (The Cauldron).
- `text`, instead of turns: a document, which is supervised as a whole.  A single turn of the
  assistant is a document too.
- `images` or `image`: one image or a list, see `pictures.picture`.
- `system` or `system_prompt`: a system message outside of the turns (LLaMA-Factory).
- `objects`: names and boxes (ms-swift), see `boxes.fill_objects`.

Keys whose value is null are ignored.  Keys that would change the meaning of the row and are not
read, such as `videos` and `rejected`, are refused; other keys are named in `Row.unread`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from vl2jax.common.errors import UserError, clip, shown
from vl2jax.common.paths import AnyPath
from vl2jax.data import keys
from vl2jax.data.boxes import fill_objects
from vl2jax.data.pictures import is_absent, picture
from vl2jax.data.placeholders import PLACEHOLDER, with_own_placeholders
from vl2jax.data.row import Row
from vl2jax.data.turns import read_pairs, read_turns
from vl2jax.processing.image import image_size
from vl2jax.processing.image_source import ImageSource
from vl2jax.processing.prompt import ASSISTANT, SYSTEM, USER, with_placeholders

# Longest message about a row, without the name of the row.
MOST = 500
_EXPECTED = (
    "expected 'messages' or 'conversations' with turns like {'role': 'user', 'content': '...'} or"
    " {'from': 'human', 'value': '...'}, or a document under 'text'"
)


def read_row(value: Any, *, where: str, root: AnyPath, file: str = "") -> Row:
    """Reads a row of any format; checks that image files exist, but does not decode them.

    Args:
      value: the row, as parsed from JSON or Parquet.
      where: name of the row in messages.
      root: folder of relative image paths.
      file: name of its file, for messages about the whole file.

    Returns:
      A document; or a conversation: an optional system message, then alternating turns of the user
      and the assistant, the last one the assistant's.

    Raises:
      UserError: the row is malformed; the message begins with `where`.
    """
    row = _read(value, where, [root])
    if row.messages:
        _named(where, _check_turns, row.messages)
    return dataclasses.replace(row, file=file) if row.unread else row


def read_question(
    value: Any,
    *,
    where: str,
    folders: Sequence[AnyPath],
    images: Sequence[Any] = (),
    keep_answer: bool = False,
) -> Row:
    """Reads a row of any format as a question for inference, without the answer at its end.

    Args:
      value: the row, as parsed from JSON or Parquet.
      where: name of the row in messages; "": none.
      folders: folders of relative image paths; the first that has an image is used.
      images: more images, for a row that has none.
      keep_answer: whether to keep the answer at the end, so that the model continues it.

    Returns:
      A conversation as `read_row` returns it, but ending with a turn of the user, or with the
      answer that is kept.

    Raises:
      UserError: the row is malformed or has no question; the message begins with `where`.
    """
    value = _without_empty_answer(value)
    row = _read(value, where, folders, images)
    messages = list(row.messages)
    if messages and messages[-1]["role"] == ASSISTANT and not keep_answer:
        messages.pop()
    _named(where, _check_question, messages)
    return dataclasses.replace(row, messages=messages)


def _named(where: str, work, *args: Any) -> Any:
    """Calls a function; puts the name of the row before its error, and bounds its length."""
    try:
        return work(*args)
    except UserError as error:
        message, cause = clip(str(error), MOST), error
    except RecursionError as error:
        message, cause = f"nested too deeply; {_EXPECTED}", error
    raise UserError(f"{where}: {message}" if where else message) from cause


def _read(value: Any, where: str, folders: Sequence[AnyPath], images: Sequence[Any] = ()) -> Row:
    """Reads a row without checking the order of its turns."""
    return _named(where, lambda: _read_parts(_without_nulls(value), where, folders, images))


def _read_parts(value: Any, where: str, folders: Sequence[AnyPath], more: Sequence[Any]) -> Row:
    row = {"messages": value} if isinstance(value, list) else value
    if not isinstance(row, Mapping):
        raise UserError(f"{_EXPECTED}; got {type(value).__name__}")
    keys.check_row(row)
    key = keys.one_key(row, keys.ROW_KEYS, _EXPECTED)
    given = _given_images(row, more)
    turns = _turns(key, row[key])
    messages, named = read_turns(turns, _system(row))
    images = [_named_picture(n, image, folders) for n, image in enumerate(_choose(given, named), 1)]
    _set_texts(
        messages,
        with_own_placeholders([(m["role"], m["content"]) for m in messages], len(images)),
    )
    document = [message["role"] for message in messages] == [ASSISTANT]
    if not document:
        _check_places(messages)
    if given:
        _add_placeholders(messages, len(images))
    _check_count(messages, len(images))
    size = functools.cache(lambda number: image_size(images[number]))
    texts = [message["content"] for message in messages]
    _set_texts(messages, fill_objects(texts, row.get("objects"), len(images), size))
    unread = keys.unread(row, turns)
    if document:
        if messages[0].get("loss") is False:
            raise UserError("the only turn has no loss, so nothing to learn; leave the row out")
        text = _answer(1, messages[0]["content"])
        return Row(text=text, images=images, where=where, unread=unread)
    return Row(messages=messages, images=images, where=where, unread=unread)


def _turns(key: str, value: Any) -> Any:
    """The turns under a key of `ROW_KEYS`."""
    if key == "text":
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"'text' must be a text that is not empty, got {shown(value)}")
        return [{"role": ASSISTANT, "content": value}]
    if key == "texts":
        return read_pairs(value)
    if key == "prompt" and not isinstance(value, list | tuple):
        if not isinstance(value, str):
            raise UserError(f"'prompt' must be a text, got {type(value).__name__}")
        return [{"role": USER, "content": value}]
    return value


def _system(row: Mapping[str, Any]) -> str | None:
    """A system message outside of the turns."""
    found = [key for key in keys.SYSTEM_KEYS if row.get(key)]
    if len(found) > 1:
        raise UserError(f"{found[0]!r} and {found[1]!r} are both given; give one of them")
    if found and not isinstance(row[found[0]], str):
        raise UserError(f"{found[0]!r} must be a text, got {shown(row[found[0]])}")
    return row[found[0]] if found else None


def _given_images(row: Mapping[str, Any], more: Sequence[Any]) -> list[Any]:
    """Images given by the row outside of its turns, or by the caller."""
    found = [key for key in keys.IMAGE_KEYS if not is_absent(row.get(key)) and row[key] != []]
    if len(found) > 1:
        raise UserError("'image' and 'images' are both given; give one of them")
    images = row[found[0]] if found else []
    images = list(images) if isinstance(images, list | tuple) else [images]
    images = [image for image in images if not is_absent(image)]
    if images and more:
        raise UserError("images in the row and outside of it; give them only once")
    return images or list(more)


def _choose(given: list[Any], named: list[Any]) -> list[Any]:
    """All images in order: those given by the row, else those that its turns name."""
    named_count = sum(source is not None for source in named)
    if given and named_count:
        raise UserError("images both in the turns and outside of them; give them in one place")
    if not given and named_count < len(named):
        raise UserError("a part of type image has no source; give it there or under 'images'")
    return given or named


def _named_picture(number: int, value: Any, folders: Sequence[AnyPath]) -> ImageSource:
    try:
        return picture(value, folders)
    except UserError as error:
        raise UserError(f"image {number}: {error}") from error


def _set_texts(messages: list[dict[str, Any]], texts: Sequence[str]) -> None:
    for message, text in zip(messages, texts, strict=True):
        message["content"] = text


def _check_places(messages: Sequence[Mapping[str, Any]]) -> None:
    for number, message in enumerate(messages, 1):
        if message["role"] != USER and PLACEHOLDER in message["content"]:
            raise UserError(
                f"message {number}: a placeholder of an image in the text of role"
                f" {message['role']!r}; images belong in user messages"
            )


def _add_placeholders(messages: list[dict[str, Any]], images: int) -> None:
    """Prepends all placeholders to the first question or document, if no text has any."""
    if any(PLACEHOLDER in message["content"] for message in messages):
        return
    first = next((message for message in messages if message["role"] == USER), messages[0])
    first["content"] = with_placeholders(first["content"], images, PLACEHOLDER)


def _check_count(messages: Sequence[Mapping[str, Any]], images: int) -> None:
    count = sum(message["content"].count(PLACEHOLDER) for message in messages)
    if count != images:
        raise UserError(
            f"{count} {PLACEHOLDER} in the text but {images} images; give one image for each, in"
            " order"
        )


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError unless questions and answers alternate and an answer is last."""
    answers = [message for message in messages if message["role"] == ASSISTANT]
    if not answers:
        raise UserError("no turn of the assistant, so nothing to learn; add its answer")
    if not any(message.get("loss", message["role"] == ASSISTANT) for message in messages):
        raise UserError("no turn has a loss, so nothing to learn; leave the row out")
    _check_order(messages)
    if messages[-1]["role"] != ASSISTANT:
        raise UserError(
            f"message {len(messages)}: the conversation ends with role {messages[-1]['role']!r};"
            " for training the last turn must be the assistant's: add it or drop the question"
        )


def _check_question(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError unless questions and answers alternate, beginning with a question."""
    if not any(message["role"] == USER for message in messages):
        raise UserError("no turn of the user before the last answer, so nothing is asked")
    _check_order(messages)


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
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


def _without_empty_answer(value: Any) -> Any:
    """Drops a last turn of the assistant without content, which the model is to answer."""
    if isinstance(value, Mapping):
        return {k: _without_empty_answer(v) if k in keys.TURN_KEYS else v for k, v in value.items()}
    if isinstance(value, list) and value and isinstance(last := value[-1], Mapping):
        role = next((last[key] for key in keys.ROLE_KEYS if key in last), None)
        is_answer = isinstance(role, str) and keys.ROLES.get(role.strip().lower()) == ASSISTANT
        if is_answer and not any(last.get(key) for key in keys.CONTENT_KEYS):
            return value[:-1]
    return value


def _without_nulls(value: Any) -> Any:
    """Removes keys that are null, at any depth, because Parquet adds all keys to all rows."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value
