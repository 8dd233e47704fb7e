"""Handling of malformed rows: raise an error, or skip them and report each once."""

from collections.abc import Callable, Sequence

from vl2jax.common.errors import UserError
from vl2jax.data.reading import BadRow

REPAIR = "repair it, or leave it out of config.data"


class Malformed:
    """Counts and reports malformed rows; raises an error for a source without any valid row.

    Attributes:
      given: whether there was any valid row.
    """

    def __init__(self, rows: Sequence[int], process_count: int):
        """
        Args:
          rows: number of rows of each source.
          process_count: number of processes that share the sources.
        """
        # Maximum number of consecutive malformed rows of a source.  It covers at least one epoch,
        # and is so large that valid rows are not missed by chance.
        self._patience = [2 * count * process_count + 64 for count in rows]
        self._in_a_row = [0] * len(rows)
        self._reported: set[str] = set()
        self.given = False

    def clear(self, source: int) -> None:
        """Records a valid row of a source."""
        self._in_a_row[source] = 0
        self.given = True

    def add(self, item: BadRow, on_skip: Callable[[str], None] | None) -> None:
        """Records a malformed row.

        Args:
          item: the row.
          on_skip: called with the row's error when it occurs for the first time; None: raise it.

        Raises:
          UserError: `on_skip` is None, or the source seems to have no valid row.
        """
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
        """Raises UserError if the data has ended and no row was valid."""
        if self._reported and not self.given:
            raise UserError(
                f"the data has no valid row, {len(self._reported)} are malformed; {REPAIR}"
                f" ({min(self._reported)})"
            )
