"""An answer as it grows on the host: end tokens, stop strings, and text that is safe to show."""

from collections.abc import Sequence

from vl2jax.processing.tokenizer import StreamDecoder, Tokenizer


class Completion:
    """Collects the tokens of one row until an end token, a stop string or the limit.

    Attributes:
      tokens: ids so far; the end token, or the token that completes a stop string, is the last.
      finish_reason: None while running, then "stop" or "length".
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        stop: Sequence[str],
        max_new_tokens: int,
    ):
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.max_new_tokens = max_new_tokens
        self._eos = frozenset(eos_token_ids)
        self._stop = tuple(text for text in stop if text)
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._text = ""
        self._shown = 0
        self._cut = False

    @property
    def text(self) -> str | None:
        """The answer as text, without end token and stop string; None without a tokenizer."""
        return None if self._decoder is None else self._text

    def push(self, tokens: Sequence[int]) -> str:
        """Takes new tokens, ignoring any after the end.

        Returns:
          Text that can be shown now: never half a character, and nothing that may yet turn out
          to be the beginning of a stop string.
        """
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.tokens.append(token)
            if token in self._eos:
                self.finish_reason = "stop"
            else:
                self._grow([token])
            if self.finish_reason is None and len(self.tokens) >= self.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None and self._decoder is not None and not self._cut:
            self._append(self._decoder.finish())
        end = len(self._text) - (self._held() if self.finish_reason is None else 0)
        fresh = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return fresh

    def _grow(self, tokens: Sequence[int]) -> None:
        if self._decoder is not None:
            self._append(self._decoder.push(tokens))

    def _append(self, fresh: str) -> None:
        """Adds text; a stop string in it ends the answer and is cut off with all that follows."""
        self._text += fresh
        found = [at for at in map(self._text.find, self._stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._cut, self.finish_reason = True, "stop"

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stop):
                return size
        return 0
