"""Keys of rows and turns: what is read, what is refused by name, and what is not read."""

from collections.abc import Mapping, Sequence
from typing import Any

from vl2jax.common.errors import UserError, named, shown
from vl2jax.processing.prompt import ASSISTANT, LOSS_KEYS, SYSTEM, USER

TURN_KEYS = ("messages", "conversations", "conversation")
ROW_KEYS = (*TURN_KEYS, "prompt", "texts", "text")  # exactly one of them decides the format
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
IMAGE_KEYS = ("images", "image")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
# Names of roles in lower case.
ROLES = {
    **dict.fromkeys(("user", "human", "<|user|>"), USER),
    **dict.fromkeys(("assistant", "gpt", "<|assistant|>", "model", "bot", "chatgpt"), ASSISTANT),
    **dict.fromkeys(("system", "deepseekapi-sys", "developer", "<|system|>"), SYSTEM),
}

ROLE_NAMES = "user, human, <|User|>, assistant, gpt, <|Assistant|>, system, developer"

_MEDIA = "not read; give frames as 'images' or leave the row out"
_PREFERENCES = "not read: preferences are not trained; leave the row out, or drop the key"
_TOOLS = "not read: the model has no tools; leave the row out, or drop the key"
_MEDIA_KEYS = ("video", "videos", "audio", "audios", "video_path", "audio_path")
_PREFERENCE_KEYS = (
    *("rejected", "chosen", "rejected_response", "rejected_messages", "rejected_images"),
    *("chosen_response", "kto_tag"),
)
_REFUSED_IN_ROWS = dict.fromkeys(_MEDIA_KEYS, _MEDIA) | dict.fromkeys(
    _PREFERENCE_KEYS, _PREFERENCES
)
_REFUSED_IN_TURNS = _REFUSED_IN_ROWS | dict.fromkeys(("tool_calls", "function_call"), _TOOLS)
# Keys that cannot mean anything for a sample, so that nothing is said about them.
_NAMES = {"id", "uid", "uuid", "idx", "index", "question_id", "source", "dataset", "split"}
_READ_IN_ROWS = {*ROW_KEYS, *SYSTEM_KEYS, *IMAGE_KEYS, "objects", *_NAMES}
_READ_IN_OBJECTS = {"ref", "bbox", "bbox_type", "image_id"}
_READ_IN_TURNS = {*ROLE_KEYS, *CONTENT_KEYS, *LOSS_KEYS, "images", "id"}


def check_row(row: Mapping[str, Any]) -> None:
    """Raises UserError if a row has a key that would change its meaning and is not read."""
    _refuse(row, _REFUSED_IN_ROWS, "")
    for key in LOSS_KEYS:
        if key in row and row[key] not in (True, 1):
            raise UserError(
                f"{key!r} of a whole row ({shown(row[key], 40)}) is not read; give it in the turns,"
                " or leave the row out"
            )


def check_turn(where: str, turn: Mapping[str, Any]) -> None:
    """Raises UserError if a turn has a key that would change its meaning and is not read."""
    _refuse(turn, _REFUSED_IN_TURNS, f"{where}: ")


def unread(row: Mapping[str, Any], turns: Any) -> tuple[str, ...]:
    """Returns the keys that are not read and not refused.

    Those of turns are given as `messages[].name`, those of objects as `objects.name`.

    Args:
      row: the row, without nulls.
      turns: its turns, if it has a list of them.
    """
    found = {key for key, value in row.items() if value and key not in _READ_IN_ROWS}
    found -= {*LOSS_KEYS, *_REFUSED_IN_ROWS}
    for turn in turns if isinstance(turns, list | tuple) else ():
        if isinstance(turn, Mapping) and not turn.keys() <= _READ_IN_TURNS:
            more = turn.keys() - _READ_IN_TURNS - _REFUSED_IN_TURNS.keys()
            found |= {f"messages[].{key}" for key in more if turn[key]}
    objects = row.get("objects")
    if isinstance(objects, Mapping):
        found |= {f"objects.{key}" for key in objects.keys() - _READ_IN_OBJECTS if objects[key]}
    return tuple(sorted(map(str, found))) if found else ()


def one_key(value: Mapping[str, Any], keys: Sequence[str], expected: str) -> str:
    """Returns the only one of `keys` that a mapping has.

    Args:
      value: the mapping.
      keys: the keys; empty texts count only if no other key is there.
      expected: what to say if there is not exactly one.

    Raises:
      UserError: there are none or several of them.
    """
    present = [key for key in keys if key in value]
    found = [key for key in present if value[key] != ""] or present[:1]
    if len(found) != 1:
        got = f"{named(found)} together" if found else f"the keys {named(value)}"
        raise UserError(f"{expected}; got {got}")
    return found[0]


def _refuse(value: Mapping[str, Any], refused: Mapping[str, str], where: str) -> None:
    for key in refused:
        if value.get(key):
            verb = "are" if key.endswith("s") else "is"
            raise UserError(f"{where}{key!r} {verb} {refused[key]}")
