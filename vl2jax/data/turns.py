"""Reads the turns of a conversation in the dialects of other tools."""

from collections.abc import Mapping
from typing import Any

from vl2jax.common.errors import UserError, shown
from vl2jax.data import keys
from vl2jax.data.pictures import is_absent
from vl2jax.data.placeholders import PLACEHOLDER
from vl2jax.processing.prompt import ASSISTANT, LOSS_KEYS, SYSTEM, USER, read_conversation

_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image", "image_base64")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes", "base64", "data", "source")


def read_turns(turns: Any, system: str | None) -> tuple[list[dict[str, Any]], list[Any]]:
    """Reads a conversation.

    Args:
      turns: a list of `{"role", "content"}` or `{"from", "value"}`, without nulls.
      system: a system message given outside of the turns; None: none.

    Returns:
      The messages `{"role", "content"}` with plain text, with `loss` where a turn says whether it
      is supervised; and the images that they name (None for a part without a source).

    Raises:
      UserError: the turns are malformed.
    """
    if not isinstance(turns, list | tuple):
        raise UserError(f"the conversation must be a list of turns, got {type(turns).__name__}")
    entries = [entry for n, turn in enumerate(turns, 1) if (entry := _entry(n, turn)) is not None]
    if system:
        if any(entry["role"] == SYSTEM for entry in entries):
            raise UserError("a system message both in the turns and under 'system'; give it once")
        entries.insert(0, {"role": SYSTEM, "content": system})
    # A document.  It may have images, which only a user's message may, so it is read as one.
    document = len(entries) == 1 and entries[0]["role"] == ASSISTANT
    if document:
        entries = [entries[0] | {"role": USER}]
    read, named = read_conversation(entries, image_token=PLACEHOLDER)
    messages = [
        {"role": ASSISTANT if document else message.kind, "content": message.text}
        | ({} if message.supervised is None else {"loss": message.supervised})
        for message in read
    ]
    return messages, named


def read_pairs(pairs: Any) -> list[dict[str, str]]:
    """Reads the questions and answers of The Cauldron: `{"user", "assistant", "source"}`.

    Args:
      pairs: the list.

    Returns:
      Turns for `read_turns`.

    Raises:
      UserError: the list or an entry has another form.
    """
    turns = []
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        if not isinstance(pair, Mapping) or not {"user", "assistant"} <= pair.keys():
            raise UserError(
                "'texts' must be a list of {'user': '...', 'assistant': '...'}, got"
                f" {shown(pairs)}"
            )
        turns += [{"role": role, "content": pair[role]} for role in ("user", "assistant")]
    return turns


def _entry(number: int, turn: Any) -> dict[str, Any] | None:
    """Converts a turn to a message for `read_conversation`; None for an empty system message."""
    where = f"message {number}"
    if not isinstance(turn, Mapping):
        raise UserError(
            f"{where}: expected a turn like {{'role': 'user', 'content': '...'}}, got {shown(turn)}"
        )
    keys.check_turn(where, turn)
    role = turn[keys.one_key(turn, keys.ROLE_KEYS, f"{where}: expected one of 'role' and 'from'")]
    kind = keys.ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if kind is None:
        raise UserError(
            f"{where}: unknown role {shown(role, 40)}; expected one of {keys.ROLE_NAMES}"
        )
    if kind == SYSTEM and not any(turn.get(key) for key in keys.CONTENT_KEYS):
        return None
    key = keys.one_key(turn, keys.CONTENT_KEYS, f"{where}: expected one of 'content' and 'value'")
    content = turn[key]
    if isinstance(content, list):
        content = [_part(where, part) for part in content]
    images = turn.get("images", [])
    if isinstance(images, list | tuple):
        images = [image for image in images if not is_absent(image)]
    flags = {key: turn[key] for key in LOSS_KEYS if key in turn}
    return {"role": kind, "content": content, "images": images} | flags


def _part(where: str, part: Any) -> dict[str, Any]:
    """Converts a part of a content to one of OpenAI's; the source of an image may be a record."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise UserError(f"{where}: a part of 'content' must be a record, got {shown(part)}")
    kind = part.get("type")
    if kind is None:
        kind = (
            "text" if "text" in part else next((k for k in ("image", "image_url") if k in part), "")
        )
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in _IMAGE_PARTS:
        source = next((part[key] for key in _IMAGE_KEYS if not is_absent(part.get(key))), None)
        return {"type": "image", "url": source}
    if isinstance(kind, str) and any(word in kind for word in ("video", "audio")):
        raise UserError(
            f"{where}: a part of type {shown(kind, 40)} is not read; give frames as images, or"
            " leave the row out"
        )
    raise UserError(
        f"{where}: a part of 'content' must be of type text, image or image_url with what that type"
        f" needs, got {shown(part)}"
    )
