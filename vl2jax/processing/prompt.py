"""Chat formats: split a conversation into pieces of text and images, which are tokenized.

Three formats of the original are supported.  `deepseek` is the format of the released models:

    <bos><|User|>: {question}\\n\\n<|Assistant|>:{answer}<eos><|User|>: ...

`plain` concatenates the texts; `alignment` replaces each question by `<image>\\n`.  A system
message, if the conversation has one, comes first, without a separator.  The original's
`system_prompt` argument only changes the text that is displayed, so here only the two `render`
functions have it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vl2jax.common.errors import UserError, shown
from vl2jax.config.processor import check_format

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
SEPARATOR = "\n\n"
# Keys of a message that say whether it is supervised: ms-swift's, OpenAI's and axolotl's.
LOSS_KEYS = ("loss", "loss_scale", "weight", "train")

# Role names and their kinds; the `deepseek` format also accepts the chat tokens.
_ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "deepseekapi-sys": SYSTEM}
_CHAT_ROLES = {"<|User|>": USER, "<|Assistant|>": ASSISTANT}


class Message(NamedTuple):
    """One message of a conversation.

    Attributes:
      kind: `USER`, `ASSISTANT` or `SYSTEM`.
      text: text without leading and trailing white space; each image is a placeholder.
      role: the caller's name of the role.
      supervised: whether its tokens are targets of the loss; None: the format decides.
    """

    kind: str
    text: str
    role: str
    supervised: bool | None = None


class Piece(NamedTuple):
    """A part of a conversation that is tokenized on its own.

    Attributes:
      kind: "text", "answer" (text of the assistant), "image", "bos" or "eos".
      supervised: whether its tokens are targets of the loss; False for images.
      text: the text of a "text" or "answer".
    """

    kind: str
    supervised: bool
    text: str = ""


def read_conversation(
    conversation: Sequence[Mapping[str, Any]],
    *,
    sft_format: str = "deepseek",
    image_token: str = "<image>",
) -> tuple[list[Message], list[Any]]:
    """Reads a conversation in the original's format or in OpenAI's.

    The original's: `{"role": "<|User|>", "content": "<image>\\n...", "images": [path, ...]}`.
    OpenAI's: `content` is a list of parts `{"type": "text", "text": ...}`, `{"type": "image_url",
    "image_url": {"url": ...}}` and `{"type": "image", "image": ...}`.  An image part becomes a
    placeholder; parts are joined by a newline unless there is white space between them.  One of
    `LOSS_KEYS` in a message, true, false, 1 or 0, says whether it is supervised.

    Args:
      conversation: the messages.
      sft_format: chat format.
      image_token: the placeholder of images.

    Returns:
      The messages, and the sources of the images that the messages name, in order; None for an
      image part without a source.

    Raises:
      UserError: the format, a role or a part is unknown, a system message is not the first message,
        an image is not in a user message, or the conversation is empty.
    """
    check_format(sft_format)
    if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence):
        raise UserError(
            "a conversation must be a list of messages like {'role': 'user', 'content': '...'},"
            f" got {type(conversation).__name__}"
        )
    if not conversation:
        raise UserError("the conversation is empty; it needs at least one message")
    messages, sources = [], []
    for index, entry in enumerate(conversation):
        message, images = _read_message(index, entry, sft_format, image_token)
        messages.append(message)
        sources.extend(images)
    return messages, sources


def conversation_pieces(
    messages: Sequence[Message],
    *,
    sft_format: str = "deepseek",
    mask_prompt: bool = True,
    image_token: str = "<image>",
) -> list[Piece]:
    """Splits a conversation into pieces, which are tokenized one by one.

    Args:
      messages: the messages.
      sft_format: chat format.
      mask_prompt: whether to exclude questions and the system message from the targets.  A message
        that says itself whether it is supervised comes first.
      image_token: the placeholder of images.
    """
    pieces = [Piece("bos", True)]
    for message in messages:
        supervised = message.supervised
        if supervised is None:
            supervised = message.kind == ASSISTANT or not mask_prompt
        if message.kind == USER:
            question = _question(message.text, sft_format)
            pieces += _split_images(question, supervised, image_token)
        elif message.kind == SYSTEM:
            pieces.append(Piece("text", supervised, message.text))
        else:
            pieces += [Piece("answer", supervised, message.text), Piece("eos", supervised)]
    return pieces


def prompt_pieces(prompt: str, *, image_token: str = "<image>") -> list[Piece]:
    """Splits an already formatted prompt into pieces; all its text is supervised."""
    return [
        Piece("bos", True),
        *_split_images(prompt, True, image_token),
        Piece("eos", True),
    ]


def count_placeholders(pieces: Sequence[Piece]) -> int:
    """Returns the number of images in the pieces."""
    return sum(piece.kind == "image" for piece in pieces)


def render_conversation(
    messages: Sequence[Message],
    *,
    sft_format: str = "deepseek",
    system_prompt: str = "",
    eos_token: str = "<｜end▁of▁sentence｜>",
) -> str:
    """Formats a conversation as readable text, as the original displays it.

    The text can differ from what is tokenized: a system message is displayed as a turn, which
    changes the separators after it.

    Args:
      messages: the messages.
      sft_format: chat format.
      system_prompt: text before the conversation; only used by the `deepseek` format.
      eos_token: text of the end-of-sequence token.

    Raises:
      UserError: the format is not supported.
    """
    check_format(sft_format)
    parts = [system_prompt + SEPARATOR] if system_prompt and sft_format == "deepseek" else []
    for index, message in enumerate(messages):
        if sft_format == "deepseek" and not message.text:
            parts.append(f"{message.role}:")
        elif sft_format == "deepseek":
            end = (SEPARATOR, eos_token)[index % 2]
            parts.append(f"{message.role}: {message.text}{end}")
        elif sft_format == "alignment" and index % 2 == 0:
            parts.append("<image>\n" if message.text else "")
        else:
            parts.append(message.text)
    return "".join(parts).strip()


def render_prompt(prompt: str, *, sft_format: str = "deepseek", system_prompt: str = "") -> str:
    """Formats a question in a chat format, up to the beginning of the answer.

    Args:
      prompt: the question.
      sft_format: chat format.
      system_prompt: see `render_conversation`.

    Raises:
      UserError: the format is not supported.
    """
    messages = [
        Message(USER, prompt.strip(), "<|User|>"),
        Message(ASSISTANT, "", "<|Assistant|>"),
    ]
    return render_conversation(messages, sft_format=sft_format, system_prompt=system_prompt)


def with_placeholders(text: str, images: int, image_token: str) -> str:
    """Prepends one line `<image>` per image, if the text has no placeholder."""
    return text if image_token in text else f"{image_token}\n" * images + text


def _question(text: str, sft_format: str) -> str:
    """The text that is tokenized for a user message, including the assistant's prefix."""
    if sft_format == "deepseek":
        asked = f"<|User|>: {text}{SEPARATOR}" if text else "<|User|>:"
        return f"{asked}<|Assistant|>:"
    if sft_format == "alignment":
        return "<image>\n" if text else ""
    return text


def _split_images(text: str, supervised: bool, image_token: str) -> list[Piece]:
    pieces: list[Piece] = []
    for index, part in enumerate(text.split(image_token)):
        if index:
            pieces.append(Piece("image", False))
        if part:
            pieces.append(Piece("text", supervised, part))
    return pieces


def _read_message(
    index: int, entry: Any, sft_format: str, image_token: str
) -> tuple[Message, list[Any]]:
    where = f"message {index + 1}"
    if not isinstance(entry, Mapping) or "role" not in entry:
        raise UserError(
            f"{where}: expected an object with 'role' and 'content', got {shown(entry)}"
        )
    roles = _ROLES | (_CHAT_ROLES if sft_format == "deepseek" else {})
    role = entry["role"]
    if not isinstance(role, str) or role not in roles:
        raise UserError(
            f"{where}: unknown role {shown(role, 40)}; format {sft_format!r} has {', '.join(roles)}"
        )
    kind = roles[role]
    if kind == SYSTEM and index > 0:
        raise UserError(f"{where}: a system message must be the first message; move it there")
    text, images = _read_content(where, entry, kind, image_token)
    if kind != USER and (image_token in text or images):
        raise UserError(
            f"{where}: {image_token} in the text of role {role!r}; images belong in user messages"
        )
    return Message(kind, text.strip(), role, _supervised(where, entry)), images


def _supervised(where: str, entry: Mapping[str, Any]) -> bool | None:
    """Whether a message says that it is supervised; None if it says nothing."""
    found = {key: entry[key] for key in LOSS_KEYS if entry.get(key) is not None}
    for key, value in found.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(
                f"{where}: {key!r} must be true, false, 1 or 0, got {shown(value, 40)}; a turn is"
                " supervised or not, without weights between"
            )
    if len({bool(value) for value in found.values()}) > 1:
        raise UserError(f"{where}: {' and '.join(found)} contradict each other; give one of them")
    return bool(next(iter(found.values()))) if found else None


def _read_content(
    where: str, entry: Mapping[str, Any], kind: str, image_token: str
) -> tuple[str, list[Any]]:
    """Text with placeholders, and the sources of the images that the message names."""
    content, images = entry.get("content"), entry.get("images", [])
    if not isinstance(images, list | tuple):
        raise UserError(f"{where}: 'images' must be a list of images, got {shown(images)}")
    if content is None and kind == ASSISTANT:
        content = ""  # the answer that the model is to generate
    if isinstance(content, str):
        return content, list(images)
    if not isinstance(content, list | tuple):
        raise UserError(
            f"{where}: 'content' must be a text or a list of parts, got {shown(content)}"
        )
    if images:
        raise UserError(f"{where}: images come either as parts of 'content' or under 'images'")
    text, sources = "", []
    for part in content:
        kind_of_part = part.get("type") if isinstance(part, Mapping) else None
        if kind_of_part == "text" and isinstance(part.get("text"), str):
            addition = part["text"]
        elif kind_of_part in ("image", "image_url"):
            addition = image_token
            sources.append(_part_source(where, part, kind_of_part))
        else:
            raise UserError(
                f"{where}: a part of 'content' must be of type text, image or image_url with what"
                f" that type needs, got {shown(part)}"
            )
        glued = not text or not addition or text[-1].isspace() or addition[0].isspace()
        text += addition if glued else "\n" + addition
    return text, sources


def _part_source(where: str, part: Mapping[str, Any], kind: str) -> Any:
    """Source of an image part: a path, URL or image; None if the part has none."""
    source = part.get(kind)
    if kind == "image" and source is None:
        return next((part[key] for key in ("path", "url") if key in part), None)
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise UserError(f"{where}: part of type image_url without a url: {shown(part)}")
    return source
