"""Chat formats: from a conversation to the pieces of text and the images that make its tokens.

Three formats of the original are built.  `deepseek` is the released one:

    <bos><|User|>: {question}\\n\\n<|Assistant|>:{answer}<eos><|User|>: ...

`plain` puts the texts side by side, `alignment` replaces each question by `<image>\\n`.  A system
message comes first, without a separator, and only if the conversation has one: the original's
`system_prompt` argument changes nothing but the text it displays, so here it is an argument of
the two `render` functions alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vl2jax.common.errors import UserError
from vl2jax.config.processor import check_format

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
SEPARATOR = "\n\n"

# Accepted role -> what it means; the chat tokens are role names of the `deepseek` format only.
_ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "deepseekapi-sys": SYSTEM}
_CHAT_ROLES = {"<|User|>": USER, "<|Assistant|>": ASSISTANT}


class Message(NamedTuple):
    """One turn.

    Attributes:
      kind: `USER`, `ASSISTANT` or `SYSTEM`.
      text: stripped; each image is one placeholder.
      role: the role as the caller wrote it.
    """

    kind: str
    text: str
    role: str


class Piece(NamedTuple):
    """What becomes one run of tokens: a text, an image, or the token `bos` or `eos`.

    Attributes:
      kind: "text", "answer" (an assistant's text), "image", "bos" or "eos".
      supervised: whether its tokens are targets (those of an image never are).
      text: what is encoded, for "text" and "answer".
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
    """Reads a conversation in the original's or in OpenAI's style.

    The original's: `{"role": "<|User|>", "content": "<image>\\n...", "images": [path, ...]}`.
    OpenAI's: `content` is a list of `{"type": "text", "text": ...}`, `{"type": "image_url",
    "image_url": {"url": ...}}` and `{"type": "image", "image": ...}`; each image becomes a
    placeholder where it stands, and parts are joined by a newline unless white space is there.

    Returns:
      The messages, and the sources of the images that the conversation itself names, in order;
      None for an image part without a source.

    Raises:
      UserError: an unknown format, role or part, a system message that is not the first, an image
        outside a user turn, or nothing at all.
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
    """Splits a conversation into the pieces that are tokenised one by one.

    Args:
      mask_prompt: whether questions and the system message are no targets.
    """
    pieces = [Piece("bos", True)]
    for message in messages:
        if message.kind == USER:
            question = _question(message.text, sft_format)
            pieces += _split_images(question, not mask_prompt, image_token)
        elif message.kind == SYSTEM:
            pieces.append(Piece("text", not mask_prompt, message.text))
        else:
            pieces += [Piece("answer", True, message.text), Piece("eos", True)]
    return pieces


def prompt_pieces(prompt: str, *, image_token: str = "<image>") -> list[Piece]:
    """Pieces of a prompt that is already formatted: all its text is a target."""
    return [
        Piece("bos", True),
        *_split_images(prompt, True, image_token),
        Piece("eos", True),
    ]


def count_placeholders(pieces: Sequence[Piece]) -> int:
    """Images that the pieces ask for."""
    return sum(piece.kind == "image" for piece in pieces)


def render_conversation(
    messages: Sequence[Message],
    *,
    sft_format: str = "deepseek",
    system_prompt: str = "",
    eos_token: str = "<｜end▁of▁sentence｜>",
) -> str:
    """The conversation as one readable text, as the original displays it.

    Not what is tokenised: a system message shows as a turn of its own, which moves the separators
    of the turns after it.
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
    """A question put into a chat format, up to where the answer begins."""
    messages = [
        Message(USER, prompt.strip(), "<|User|>"),
        Message(ASSISTANT, "", "<|Assistant|>"),
    ]
    return render_conversation(messages, sft_format=sft_format, system_prompt=system_prompt)


def with_placeholders(text: str, images: int, image_token: str) -> str:
    """Puts one line `<image>` per image in front of a text that has no placeholder."""
    return text if image_token in text else f"{image_token}\n" * images + text


def _question(text: str, sft_format: str) -> str:
    """What is tokenised for a user turn, the call for an answer included."""
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
        raise UserError(f"{where}: expected an object with 'role' and 'content', got {entry!r:.80}")
    roles = _ROLES | (_CHAT_ROLES if sft_format == "deepseek" else {})
    role = entry["role"]
    if not isinstance(role, str) or role not in roles:
        raise UserError(
            f"{where}: unknown role {role!r}; format {sft_format!r} has {', '.join(roles)}"
        )
    kind = roles[role]
    if kind == SYSTEM and index > 0:
        raise UserError(f"{where}: a system message must be the first message; move it there")
    text, images = _read_content(where, entry, kind, image_token)
    if kind != USER and (image_token in text or images):
        raise UserError(
            f"{where}: {image_token} in the text of role {role!r}; images belong in user messages"
        )
    return Message(kind, text.strip(), role), images


def _read_content(
    where: str, entry: Mapping[str, Any], kind: str, image_token: str
) -> tuple[str, list[Any]]:
    """Text with placeholders, and the sources of the message's own images."""
    content, images = entry.get("content"), entry.get("images", [])
    if not isinstance(images, list | tuple):
        raise UserError(f"{where}: 'images' must be a list of images, got {images!r:.80}")
    if content is None and kind == ASSISTANT:
        content = ""  # an answer still to come
    if isinstance(content, str):
        return content, list(images)
    if not isinstance(content, list | tuple):
        raise UserError(
            f"{where}: 'content' must be a text or a list of parts, got {content!r:.80}"
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
                f" that type needs, got {part!r:.80}"
            )
        glued = not text or not addition or text[-1].isspace() or addition[0].isspace()
        text += addition if glued else "\n" + addition
    return text, sources


def _part_source(where: str, part: Mapping[str, Any], kind: str) -> Any:
    """Where an image part's picture is: a path, URL or image; None if the caller gives it."""
    source = part.get(kind)
    if kind == "image" and source is None:
        return next((part[key] for key in ("path", "url") if key in part), None)
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise UserError(f"{where}: part of type image_url without a url: {part!r:.80}")
    return source
