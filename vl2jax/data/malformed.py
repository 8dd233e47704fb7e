"""What becomes of malformed rows: raised, or counted, reported once, and passed over."""

from collections.abc import Callable, Sequence

from vl2jax.common.errors import UserError
from vl2jax.data.reading import BadRow

REPAIR = "repair it, or leave it out of config.data"


class Malformed:
    """Malformed rows: each is reported once, and a source without any other is given up."""

    def __init__(self, rows: Sequence[int], process_count: int):
        # At least one whole epoch, and for a share of a source such a number by chance never.
        self._patience = [2 * count * process_count + 64 for count in rows]
        self._in_a_row = [0] * len(rows)
        self._reported: set[str] = set()
        self.given = False  # whether there ever was a good row

    def clear(self, source: int) -> None:
        """Notes a good row."""
        self._in_a_row[source] = 0
        self.given = True

    def add(self, item: BadRow, on_skip: Callable[[str], None] | None) -> None:
        """Notes a malformed row, or raises it as UserError where there is no `on_skip`."""
        if on_skip is None:
            raise UserError(item.error)
        if item.error not in self._reported:
            self._reported.add(item.error)
            on_skip(item.error)
        self._in_a_row[item.source] += 1
        if self._in_a_row[item.source] >= self._patience[item.source]:
            raise UserError(
                f"data source {item.source + 1} has no valid row: the last"
                f" {self._in_a_row[item.source]} that were read are malformed; {REPAIR}"
                f" ({item.error})"
            )

    def end(self) -> None:
        """Raises UserError where the data ended without any good row."""
        if self._reported and not self.given:
            raise UserError(
                f"the data has no valid row, {len(self._reported)} are malformed; {REPAIR}"
                f" ({min(self._reported)})"
            )
