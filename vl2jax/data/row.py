"""`Row`: the record that every data format is converted to; `Source`: a sequence of rows."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vl2jax.processing.image_source import ImageSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One training example before tokenization.

    Attributes:
      messages: the messages of a conversation, `{"role": "user", "content": ...}`, with `<image>`
        placeholders in the text, see `prompt.read_conversation`; empty for a document.  A message
        may have `loss`: whether it is supervised, whatever the run's settings say.
      images: source of the image of each placeholder, in order.
      where: name of the row in messages, such as "captions.jsonl:17".
      text: a document (pre-training), which is supervised as a whole; None for a conversation.
      unread: keys of the row that were not read.
      file: name of its file, if there are such keys.
    """

    messages: Sequence[Mapping[str, Any]] = ()
    images: Sequence[ImageSource] = ()
    where: str
    text: str | None = None
    unread: tuple[str, ...] = ()
    file: str = ""


class Source(Protocol):
    """A sequence of rows.  `source[i]` raises UserError, naming the row, if it is malformed.

    A source with a true attribute `ordered` is read in order, never shuffled.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


def row_place(index: int, count: int) -> int:
    """Returns a row's number from 0; negative indices count from the end, as for a list.

    Args:
      index: the index, an integer of any kind.
      count: number of rows of the source.

    Raises:
      IndexError: there is no such row.
    """
    place = operator.index(index)
    if not -count <= place < count:
        raise IndexError(f"row {place} of a source with {count} rows")
    return place % count
