"""An answer while it is generated: end tokens, stop strings, and text that is safe to stream."""

from collections.abc import Sequence

from vl2jax.processing.tokenizer import StreamDecoder, Tokenizer

NOT_FINITE = -2  # stands for a token whose logits were not all finite


class Completion:
    """Collects the tokens of one sequence until an end token, a stop string or the length limit.

    Attributes:
      tokens: token ids so far.  The end token, or the token that completes a stop string, is the
        last one.
      finish_reason: None while the answer is generated, then "stop", "length", or "error" if the
        model's logits were not finite.
      max_new_tokens: maximum number of tokens.
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
        self._stop = tuple(stop)
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._text = ""
        self._shown = 0
        self._cut = False

    @property
    def text(self) -> str | None:
        """The answer's text, without end token and stop string; None without a tokenizer."""
        return None if self._decoder is None else self._text

    @property
    def error(self) -> str | None:
        """What went wrong, in one line; None if nothing did."""
        if self.finish_reason != "error":
            return None
        return (
            f"the model's logits are not finite (NaN or infinite) after {len(self.tokens)} tokens"
            " of the answer; check the weights of the checkpoint, or compute in float32"
        )

    def push(self, tokens: Sequence[int]) -> str:
        """Adds new tokens; ignores those after the end of the answer.

        Args:
          tokens: token ids; `NOT_FINITE` ends the answer with an error.

        Returns:
          New text that can be shown now.  Incomplete characters are held back, and so is text that
          may be the beginning of a stop string.
        """
        for token in tokens:
            if self.finish_reason is not None:
                break
            if token == NOT_FINITE:
                self.finish_reason = "error"
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
        end = len(self._text) - (self._held_back() if self.finish_reason is None else 0)
        fresh = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return fresh

    def _grow(self, tokens: Sequence[int]) -> None:
        if self._decoder is not None:
            self._append(self._decoder.push(tokens))

    def _append(self, fresh: str) -> None:
        """Adds text.  A stop string ends the answer; it is cut off, with all text after it."""
        self._text += fresh
        found = [at for at in map(self._text.find, self._stop) if at >= 0]
        if found:
            self._text = self._text[: min(found)]
            self._cut, self.finish_reason = True, "stop"

    def _held_back(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stop):
                return size
        return 0
