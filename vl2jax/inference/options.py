"""Options of generation: their names, and the checks that need no model."""

import hashlib
import inspect
import math
import operator
from collections import abc
from collections.abc import Callable
from typing import Any, TypedDict

import jax.numpy as jnp
import numpy as np

from vl2jax.common.errors import UserError, shown
from vl2jax.model.vl2 import DTYPES

MAX_N = 1024  # largest number of answers to one prompt


class GenerateOptions(TypedDict, total=False):
    """The options of `generate` and `stream`; `stream` documents them."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: str | abc.Sequence[str] | None
    seed: int | abc.Sequence[int] | np.ndarray
    n: int
    eos_token_id: int | abc.Sequence[int] | None
    tokenizer: Any
    batch_size: int
    chunk_size: int
    dtype: Any
    cache_dtype: Any


def has_options_of(function: Callable) -> Callable[[Callable], Callable]:
    """Decorator: the signature shows the keyword-only options of `function` for `**options`."""

    def decorate(taking: Callable) -> Callable:
        own = inspect.signature(taking)
        *before, _ = own.parameters.values()
        options = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        names = {parameter.name for parameter in before}
        kept = [parameter for parameter in options if parameter.name not in names]
        taking.__signature__ = own.replace(parameters=[*before, *kept])  # type: ignore[attr-defined]
        return taking

    return decorate


class Checks:
    """Collects what is wrong with several numbers, so that one error names all of it."""

    def __init__(self):
        self._wrong: list[str] = []

    def whole(self, name: str, value: Any, fits: Callable[[int], bool], want: str) -> int:
        """Reads a whole number: a Python or NumPy integer, or a float without fraction."""
        number = as_whole(value)
        if number is None or not fits(number):
            self._wrong.append(f"{name} must be {want}, got {shown(value, 40)}")
            return 0
        return number

    def real(self, name: str, value: Any, fits: Callable[[float], bool], want: str) -> float:
        """Reads a finite number, of Python or NumPy."""
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or not fits(number):
            self._wrong.append(f"{name} must be {want}, got {shown(value, 40)}")
        return number

    def finish(self) -> None:
        """Raises UserError if something was wrong."""
        if self._wrong:
            raise UserError("; ".join(self._wrong))


def as_whole(value: Any) -> int | None:
    """Converts a Python or NumPy integer, or a float without fraction; None for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        is_float = isinstance(value, float | np.floating)
        return int(value) if is_float and float(value).is_integer() else None


def _is_one(value: Any) -> bool:
    """Whether a value is a single one, not several: a 0-dimensional array is one, too."""
    several = isinstance(value, abc.Iterable) and getattr(value, "ndim", 1)
    return not several or isinstance(value, str | bytes)


def read_whole(name: str, value: Any, low: int) -> int:
    """Reads a whole number of at least `low`; raises UserError for anything else."""
    checks = Checks()
    number = checks.whole(name, value, lambda x: x >= low, f"{low} or more, a whole number")
    checks.finish()
    return number


def read_n(n: Any) -> int:
    """Reads the number of answers to a prompt; raises UserError if it is not 1 to `MAX_N`."""
    checks = Checks()
    number = checks.whole("n", n, lambda x: 1 <= x <= MAX_N, f"a whole number from 1 to {MAX_N}")
    checks.finish()
    return number


def read_stop(stop: str | abc.Sequence[str] | None) -> tuple[str, ...]:
    """Reads stop strings: a single one, several, or None.

    Raises:
      UserError: one of them is not a text, or is empty.
    """
    texts = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(texts, abc.Iterable) or isinstance(texts, bytes | abc.Mapping):
        raise UserError(f"stop must be a text or a list of texts, got {shown(stop, 40)}")
    texts = tuple(texts)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UserError(f"stop strings must be texts that are not empty, got {shown(text, 40)}")
    return texts


def read_token_ids(ids: Any) -> list[int]:
    """Reads the ids of end tokens: a single one, several, or None.

    Raises:
      UserError: one of them is not a whole number from 0.
    """
    if ids is None:
        return []
    given = [ids] if _is_one(ids) else list(ids)
    found = [as_whole(one) for one in given]
    for one, number in zip(given, found, strict=True):
        if number is None or not 0 <= number < 2**31:
            raise UserError(f"eos_token_id must be whole numbers from 0, got {shown(one, 40)}")
    return [number for number in found if number is not None]


def read_seed(seed: Any) -> int:
    """Reads a seed: a whole number of 64 bits, with or without sign.

    Raises:
      UserError: it is none.
    """
    number = as_whole(seed)
    if number is None or not -(2**63) <= number < 2**64:
        raise UserError(f"seed must be a whole number of at most 64 bits, got {shown(seed, 40)}")
    return number


def read_seeds(seed: Any, rows: int) -> list[int]:
    """Expands `seed` to one seed per row.

    Args:
      seed: a seed, or one per row (a sequence or an array).
      rows: number of rows.

    Raises:
      UserError: it is neither.
    """
    if _is_one(seed):
        return [read_seed(seed)] * rows
    seeds = [read_seed(one) for one in seed]
    if len(seeds) != rows:
        raise UserError(f"seed must be one number or one per row ({rows}), got {len(seeds)}")
    return seeds


def seed_of_answer(seed: int, number: int) -> int:
    """Seed of one of several answers to a prompt.

    Args:
      seed: seed of the prompt.
      number: number of the answer, from 0; the first answer has the seed of the prompt.
    """
    if number == 0:
        return seed
    text = f"{seed % 2**64}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def split_seed(seed: int) -> tuple[int, int]:
    """Upper and lower 32 bits of a seed, for `sampling.make_keys`."""
    return (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF


def read_dtype(name: str, dtype: Any) -> jnp.dtype:
    """Reads a dtype that is a key of `DTYPES`, or a NumPy dtype of these.

    Args:
      name: name of the option.
      dtype: the dtype.

    Raises:
      UserError: it is another one, or none.
    """
    try:
        found = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        found = shown(dtype, 40)
    if found not in DTYPES:
        raise UserError(f"{name} must be one of {', '.join(DTYPES)}, got {shown(found, 40)}")
    return jnp.dtype(DTYPES[found])
