"""Texts in a configuration that name steps (`profile`) and batches (`data.skip_batches`)."""

from vl2jax.common.errors import UserError, shown

_DIGITS = 12  # maximum length of a number
_MOST_BATCHES = 10_000  # each is read before it is passed over


def parse_window(text: str) -> tuple[int, int] | None:
    """Parses "START:STOP".

    Returns:
      START and STOP; None for "".

    Raises:
      UserError: the text has another form, or START is not below STOP.
    """
    if not text:
        return None
    start, stop = map(_number, text.split(":")) if text.count(":") == 1 else (None, None)
    if start is None or stop is None or start >= stop:
        raise UserError(f"profile must be START:STOP, like 10:15, got {shown(text)}")
    return start, stop


def parse_batches(text: str) -> tuple[range, ...]:
    """Parses numbers of batches and ranges of them, such as "7,40-42".

    Raises:
      UserError: the text has another form, or names more than 10000 batches.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        ends = [_number(end.strip()) for end in part.split("-")]
        first, last = ends[0], ends[-1]
        if len(ends) > 2 or first is None or last is None or not 1 <= first <= last:
            raise UserError(
                f"data.skip_batches must be numbers of batches from 1, such as 7,40-42; got"
                f" {shown(part)}"
            )
        found.append(range(first, last + 1))
    if sum(map(len, found)) > _MOST_BATCHES:
        raise UserError(f"data.skip_batches names more than {_MOST_BATCHES} batches")
    return tuple(found)


def _number(text: str) -> int | None:
    """A number of ASCII digits; None for any other text."""
    good = text.isascii() and text.isdecimal() and len(text) <= _DIGITS
    return int(text) if good else None
