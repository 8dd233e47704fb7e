"""Malformed rows: raises an error, or skips them, counts them and reports each once."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from vl2jax.common.errors import UserError, clip
from vl2jax.data.reading import BadRow, ReadRow

REPAIR = "repair it, or leave it out of config.data"
SKIP = "--config.data.on_error=skip"
# The share of skipped rows of a source is judged as if at least so many rows had been read, so that
# a few bad rows at the beginning do not end a run.
LEAST_ROWS = 100


@dataclasses.dataclass
class Counts:
    """Rows that were read since the beginning of the run, in all epochs.

    Attributes:
      read: rows of each source, with the skipped ones.
      skipped: skipped rows of each source.
      too_long: rows that were skipped or truncated because they did not fit into a batch.
      truncated: rows that were truncated.
    """

    read: list[int]
    skipped: list[int]
    too_long: int = 0
    truncated: int = 0

    def totals(self) -> list[int]:
        """Returns `[read, skipped, too_long, truncated]` over all sources."""
        return [sum(self.read), sum(self.skipped), self.too_long, self.truncated]


class Malformed:
    """Counts and reports malformed rows; raises an error if too many rows of a source are.

    Attributes:
      counts: the rows so far.
      given: whether there was any valid row.
    """

    def __init__(self, rows: Sequence[int], process_count: int, max_skipped: float):
        """
        Args:
          rows: number of rows of each source.
          process_count: number of processes that share the sources.
          max_skipped: maximum share of skipped rows of a source, 0 to 1, among the rows that this
            process has read (counted as `LEAST_ROWS` at least).
        """
        self._max_skipped = max_skipped
        # Maximum number of consecutive malformed rows of a source: what this process reads of it in
        # one epoch.  It ends a run whose `max_skipped` is 1.
        self._patience = [-(-count // process_count) + LEAST_ROWS for count in rows]
        self._in_a_row = [0] * len(rows)
        self._reported: set[int] = set()  # hashes of messages
        self._example = ""
        self.counts = _no_counts(len(rows))
        self.given = False

    def get_state(self) -> dict[str, Any]:
        """Returns the counts as JSON values."""
        return dataclasses.asdict(self.counts)

    def set_state(self, state: dict[str, Any] | None, begun: bool) -> None:
        """Continues with saved counts.

        Args:
          state: see `get_state`; None: the checkpoint has none, counting begins at zero.
          begun: whether any row was read before.
        """
        if state is None:
            self.counts = _no_counts(len(self._patience))
            self.given |= begun
        else:
            self.counts = Counts(**state)
            read, skipped, *_ = self.counts.totals()
            self.given |= read > skipped

    def valid(self, item: ReadRow) -> None:
        """Records a valid row."""
        self.counts.read[item.source] += 1
        self.counts.too_long += item.sample.truncated
        self.counts.truncated += item.sample.truncated
        self._in_a_row[item.source] = 0
        self.given = True

    def add(self, item: BadRow, on_skip: Callable[[str], None], raises: bool) -> None:
        """Records a row that is malformed or too long.

        Args:
          item: the row.
          on_skip: called with the row's error when it occurs for the first time.
          raises: whether a malformed row is an error.

        Raises:
          UserError: the row is an error, or too many rows of the source are skipped.
        """
        if raises and not item.skip:
            raise UserError(f"{item.error}; repair the row, or set {SKIP} to train without it")
        if hash(item.error) not in self._reported:
            self._reported.add(hash(item.error))
            on_skip(item.error)
        self._example = self._example or item.error
        source = item.source
        self.counts.read[source] += 1
        self.counts.skipped[source] += 1
        self.counts.too_long += item.too_long
        self._in_a_row[source] += 1
        read, skipped = self.counts.read[source], self.counts.skipped[source]
        name, last = f"data source {source + 1}", clip(item.error, 300)
        too_many = skipped > self._max_skipped * max(read, LEAST_ROWS)
        if self._in_a_row[source] >= self._patience[source] or (too_many and skipped == read):
            raise UserError(
                f"{name} has no valid row: the last {self._in_a_row[source]} that were read are"
                f" malformed; {REPAIR} ({last})"
            )
        if too_many:
            raise UserError(
                f"{name}: {skipped} of the {read} rows read so far are skipped, more than the share"
                f" config.data.max_skipped {self._max_skipped:g} allows; {REPAIR}, or raise the"
                f" limit (the last: {last})"
            )

    def end(self) -> None:
        """Raises UserError if the data has ended and no row was valid."""
        if self._reported and not self.given:
            raise UserError(
                f"the data has no valid row, {len(self._reported)} are malformed; {REPAIR}"
                f" ({clip(self._example, 300)})"
            )


def _no_counts(sources: int) -> Counts:
    return Counts([0] * sources, [0] * sources)
