"""The tokenizer of a model directory, with the special tokens that the processor needs."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers

from vl2jax.common.errors import UserError, reason, shown
from vl2jax.common.json_file import object_in, read_bytes, read_object

GROUNDING_TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
CHAT_TOKENS = ("<|User|>", "<|Assistant|>")

_LIMIT = 2**26  # bytes of tokenizer.json; that of the released models has 8 MB
_PROBE = "What is in the image? 图 12"  # a text that every tokenizer must encode and decode
_MOST_CHARACTERS = 1000  # of a special token

# Replacements of `clean_up_tokenization_spaces`, in order; the released tokenizers do not set it.
_CLEAN_UP = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
# Characters at the end of a text that are held back while streaming; more than these replacements
# can change.
_CLEAN_UP_REACH = 32


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Encodes text to token ids and decodes them.

    Attributes:
      backend: the `tokenizers` object, with all special tokens.
      bos_id, eos_id, pad_id, image_id: ids of the tokens that prompts and batches need.
      image_token: placeholder of images, `<image>`.
      eos_token: text of the end-of-sequence token.
      cleans_up: whether decoding removes spaces before punctuation
        (`clean_up_tokenization_spaces`).
    """

    backend: tokenizers.Tokenizer
    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int
    image_token: str
    eos_token: str
    cleans_up: bool = False

    @classmethod
    def from_dir(
        cls,
        path: str | os.PathLike,
        *,
        image_token: str = "<image>",
        pad_token: str = "<｜▁pad▁｜>",
    ) -> "Tokenizer":
        """Reads `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

        Missing special tokens are appended to the vocabulary in the order of the original
        processor: the tokenizer's special tokens, pad, `<image>`, grounding tokens, chat tokens.

        Args:
          path: directory with the files.
          image_token: placeholder of images.
          pad_token: padding token, if the files do not name one.

        Raises:
          UserError: a file is missing or malformed, or names no bos or eos token.
        """
        path = pathlib.Path(path)
        config = read_object(path / "tokenizer_config.json", required=False)
        special = _special_tokens(path, config)
        for name in ("bos_token", "eos_token"):
            if not special.get(name):
                raise UserError(
                    f"{path}: neither tokenizer_config.json nor special_tokens_map.json names a"
                    f" {name}; take both files from the checkpoint"
                )
        backend = _read_backend(path / "tokenizer.json")
        extra = special.pop("additional_special_tokens", [])
        pad_token = special.get("pad_token") or pad_token
        with _as_user_error(path / "tokenizer.json"):
            _add_listed(backend, path, config)
            _add(backend, filter(None, [*special.values(), *extra]))
            for tokens in ([pad_token], [image_token], GROUNDING_TOKENS, CHAT_TOKENS):
                _add(backend, tokens)
        bos_token, eos_token = special["bos_token"], special["eos_token"]
        return cls(
            backend=backend,
            bos_id=_id_of(backend, bos_token),
            eos_id=_id_of(backend, eos_token),
            pad_id=_id_of(backend, pad_token),
            image_id=_id_of(backend, image_token),
            image_token=image_token,
            eos_token=eos_token,
            cleans_up=bool(config.get("clean_up_tokenization_spaces", False)),
        )

    def __len__(self) -> int:
        """Number of tokens, including added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def max_id(self) -> int:
        """The largest token id; larger than `len(self) - 1` if the ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token.

        Args:
          token: the exact text of the token.

        Raises:
          UserError: there is no such token.
        """
        return _id_of(self.backend, token)

    def encode(self, text: str) -> list[int]:
        """Encodes a text without adding bos or eos.

        Args:
          text: the text; special tokens that are written in it become their ids.

        Raises:
          UserError: the text has an unpaired surrogate, which JSON and shell arguments can contain.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a text is not valid Unicode ({error.reason})") from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decodes token ids.

        Args:
          ids: token ids; ids outside the vocabulary are skipped.
          skip_special_tokens: whether to leave special tokens out.
        """
        text = self.backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)
        if self.cleans_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text


class StreamDecoder:
    """Decodes a stream of token ids; the returned texts concatenate to the decoding of all ids.

    A byte-level token can end inside a character, so text that may still change is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # ids since the last point where all text had been returned
        self._given = 0  # number of characters of their text that were returned

    def push(self, ids: Sequence[int]) -> str:
        """Adds token ids and returns the new text that can no longer change."""
        self._ids.extend(ids)
        text = self._text()
        if self._tokenizer.cleans_up:
            settled = max(self._given, len(text) - _CLEAN_UP_REACH)
        elif text.endswith("\ufffd"):  # stands for the bytes of an incomplete character
            settled = max(self._given, len(text) - 1)
        else:
            new, self._ids, self._given = text[self._given :], [], 0
            return new
        new, self._given = text[self._given : settled], settled
        return new

    def finish(self) -> str:
        """Returns the text that was held back, and resets the decoder."""
        rest = self._text()[self._given :]
        self._ids, self._given = [], 0
        return rest

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)


def _read_backend(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Reads `tokenizer.json`, and tries it on a text."""
    content = read_bytes(path, _LIMIT)
    decoder = object_in(path, content).get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise UserError(f"{path}: decoder must be ByteLevel, got {shown(decoder)}")
    with _as_user_error(path):
        backend = tokenizers.Tokenizer.from_buffer(content)
        # These are settings of the last program that used the file, not of the model.
        backend.no_truncation()
        backend.no_padding()
        backend.decode(backend.encode(_PROBE, add_special_tokens=False).ids)
    return backend


@contextlib.contextmanager
def _as_user_error(path: pathlib.Path) -> Iterator[None]:
    """Raises UserError in the place of errors of the library `tokenizers`.

    It raises plain `Exception`s, and `PanicException`s, which are no `Exception`s and not public.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        raise UserError(
            f"{path}: not a tokenizer that works ({reason(error)}); take it from the checkpoint"
        ) from error


def _id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer has no token {shown(token)}")
    return found


def _special_tokens(path: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
    """Texts of the special tokens by name, in the order in which the original adds them.

    `special_tokens_map.json` takes precedence over `tokenizer_config.json`, but is not read if the
    latter has `added_tokens_decoder`.
    """
    sources = [config]
    if "added_tokens_decoder" not in config:
        sources.append(read_object(path / "special_tokens_map.json", required=False))
    merged = {"unk_token": "<unk>"}  # default of the tokenizer class; null in the released files
    for source in sources:
        merged |= source
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: _token_text(path, name, merged.get(name)) for name in names}
    extra = merged.get("additional_special_tokens") or []
    if not isinstance(extra, list):
        raise UserError(f"{path}: additional_special_tokens must be a list, got {shown(extra)}")
    texts = [_token_text(path, "additional_special_tokens", token) for token in extra]
    return special | {"additional_special_tokens": texts}


def _token_text(path: pathlib.Path, name: str, token: Any) -> str | None:
    """Text of a token that is given as a string, as an object with `content`, or as null."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or (isinstance(token, str) and len(token) <= _MOST_CHARACTERS):
        return token
    raise UserError(
        f"{path}: {name} must be a string of at most {_MOST_CHARACTERS} characters, or have such a"
        f" 'content', got {shown(token)}"
    )


def _add_listed(backend: tokenizers.Tokenizer, path: pathlib.Path, config: dict[str, Any]) -> None:
    """Adds missing tokens of `tokenizer_config.json`'s `added_tokens_decoder`, sorted by id."""
    listed = config.get("added_tokens_decoder", {})
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    try:
        tokens = [
            tokenizers.AddedToken(
                token["content"],
                special=token.get("special", False),
                **{flag: token[flag] for flag in flags if flag in token},
            )
            for _, token in sorted(listed.items(), key=lambda item: int(item[0]))
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'tokenizer_config.json'}: added_tokens_decoder must map ids to objects with"
            " a 'content'"
        ) from error
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in tokens:
        if token.content not in known:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _add(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Adds special tokens; an existing token keeps its id."""
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in tokens]
    )
