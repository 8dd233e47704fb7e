"""What every source of training data gives: one conversation with its pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vl2jax.processing.image import ImageSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One training example before tokenisation.

    Attributes:
      messages: turns as `prompt.read_conversation` takes them: `{"role": "user", "content": ...}`,
        images as `<image>` in the text; empty where the row is plain text.
      images: sources of the pictures, one for each `<image>`, in order.
      where: how a message about this row names it: "captions.jsonl:17".
      text: a document without turns (pre-training), all of it supervised; then no messages.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    images: Sequence[ImageSource] = ()
    where: str
    text: str | None = None


class Source(Protocol):
    """Rows by number.  `source[i]` raises `UserError` for a malformed row, naming `where`.

    One with an attribute `ordered` that is true is read in order, never shuffled.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...
