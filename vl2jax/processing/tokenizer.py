"""The tokenizer of a checkpoint directory, with the special tokens that the processor needs."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from vl2jax.common.errors import UserError

GROUNDING_TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
CHAT_TOKENS = ("<|User|>", "<|Assistant|>")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

# Replacements of `clean_up_tokenization_spaces`, in order; no released tokenizer asks for them.
_CLEAN_UP = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)
# Longer than the text at the end that the replacements above can still change together.
_CLEAN_UP_REACH = 32


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers` object, special tokens added.
      bos_id, eos_id, pad_id, image_id: ids of the tokens that prompts and batches need.
      image_token: the placeholder, `<image>`.
      eos_token: the text of the end-of-sequence token.
      cleans_up: whether decoded text loses its spaces before punctuation.
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

        Tokens that the file lacks are added behind its vocabulary in the order of the original
        processor: its own special tokens, pad, `<image>`, grounding, chat.

        Raises:
          UserError: a file is absent or malformed, or bos or eos is not named.
        """
        path = pathlib.Path(path)
        config = read_json(path / "tokenizer_config.json", required=False)
        special = _special_tokens(path, config)
        for name in ("bos_token", "eos_token"):
            if not special.get(name):
                raise UserError(
                    f"{path}: neither tokenizer_config.json nor special_tokens_map.json names a"
                    f" {name}; take both files from the checkpoint"
                )
        backend = _read_backend(path / "tokenizer.json")
        _add_listed(backend, path, config)
        extra = special.pop("additional_special_tokens", [])
        _add(backend, [*filter(None, special.values()), *extra])
        pad_token = special.get("pad_token") or pad_token
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
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def max_id(self) -> int:
        """The largest token id; more than `len - 1` where ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def token_to_id(self, token: str) -> int:
        """Id of one token by its exact text.

        Raises:
          UserError: there is no such token.
        """
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token!r}")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; adds no bos or eos, but special tokens written in it count.

        Raises:
          UserError: the text has half a surrogate pair, as JSON and the shell can give.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a text is not valid Unicode ({error.reason})") from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids; ids beyond the vocabulary give nothing."""
        text = self.backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)
        if self.cleans_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text


class StreamDecoder:
    """Decodes token by token: the pieces put together are exactly the decoding of all ids.

    Byte-level tokens may end inside a character, so what is not settled yet is held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # since the last place where text and tokens ended together
        self._given = 0  # characters of their text that were already returned

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids and returns the text that can no longer change."""
        self._ids.extend(ids)
        text = self._text()
        if self._tokenizer.cleans_up:
            settled = max(self._given, len(text) - _CLEAN_UP_REACH)
        elif text.endswith("\ufffd"):  # one mark for the bytes of a character that may go on
            settled = max(self._given, len(text) - 1)
        else:
            new, self._ids, self._given = text[self._given :], [], 0
            return new
        new, self._given = text[self._given : settled], settled
        return new

    def finish(self) -> str:
        """Returns what was held back and starts anew."""
        rest = self._text()[self._given :]
        self._ids, self._given = [], 0
        return rest

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)


def read_json(path: pathlib.Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object; {} for a file that may be absent."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise UserError(
            f"{path}: not found; a model directory holds {', '.join(FILES)} beside its weights"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); take it from the checkpoint") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_backend(path: pathlib.Path) -> tokenizers.Tokenizer:
    value = read_json(path)
    decoder = value.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise UserError(f"{path}: decoder must be ByteLevel, got {decoder!r:.80}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise UserError(
            f"{path}: not a tokenizer ({error}); take it from the checkpoint"
        ) from error


def _id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    assert found is not None, token  # it was added
    return found


def _special_tokens(path: pathlib.Path, config: dict[str, Any]) -> dict[str, Any]:
    """Texts of the special tokens, in the original's order of adding them.

    The map decides over the configuration, except for one that lists its tokens itself.
    """
    sources = [config]
    if "added_tokens_decoder" not in config:
        sources.append(read_json(path / "special_tokens_map.json", required=False))
    merged = {"unk_token": "<unk>"}  # the tokenizer class's own default; released files say null
    for source in sources:
        merged |= source
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: _token_text(path, name, merged.get(name)) for name in names}
    extra = merged.get("additional_special_tokens") or []
    if not isinstance(extra, list):
        raise UserError(f"{path}: additional_special_tokens must be a list, got {extra!r:.80}")
    texts = [_token_text(path, "additional_special_tokens", token) for token in extra]
    return special | {"additional_special_tokens": texts}


def _token_text(path: pathlib.Path, name: str, token: Any) -> str | None:
    """Text of a token given as a string, as an object with `content`, or as null."""
    if isinstance(token, dict):
        token = token.get("content")
    if token is None or isinstance(token, str):
        return token
    raise UserError(f"{path}: {name} must be a string or have a 'content', got {token!r:.80}")


def _add_listed(backend: tokenizers.Tokenizer, path: pathlib.Path, config: dict[str, Any]) -> None:
    """Adds, by id, the tokens that `tokenizer_config.json` lists and the tokenizer lacks."""
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


def _add(backend: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Makes texts special tokens; one that exists keeps its id."""
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=True) for token in tokens]
    )
