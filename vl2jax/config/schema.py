"""Reads and writes dataclasses as JSON objects in the Hugging Face schema."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vl2jax.common.errors import UserError, joined, shown
from vl2jax.config.inert import NEUTRAL, is_inert


class ConfigError(UserError):
    """An invalid configuration; the message names the field, what was expected, and the fix."""


# Limits of `candidate_resolutions`; the released files have 23 pairs of up to 3456 pixels.
MOST_RESOLUTIONS, MOST_PIXELS = 1000, 2**17
_HINTS = 20  # problems for which the nearest name is looked up, which is slow


def read(
    cls,
    values: Any,
    where: str,
    model_type: str | None,
    *,
    inert: Callable[[str, Any], bool] = is_inert,
    file: str = "config",
):
    """Builds a dataclass from a JSON object.

    Args:
      cls: the dataclass.
      values: the JSON object.
      where: name of the object in error messages; "" at the top level.
      model_type: required value of the field `model_type` if it is present; None: any.
      inert: whether a field that the dataclass does not have may be there, given name and value.
      file: name of the file in error messages.

    Raises:
      ConfigError: a field is unknown, missing or of the wrong type; lists all problems.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{file}: {where} must be an object with fields, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    kept, problems = {}, []
    found = values.get("model_type", model_type)
    if model_type is not None and found != model_type:
        problems.append(f"{prefix}model_type must be {model_type!r}, got {shown(found)}")
    for name, value in values.items():
        if name in fields:
            if not _type_fits(value, fields[name].type):
                expected = _type_name(fields[name].type)
                problems.append(f"{prefix}{name} must be {expected}, got {shown(value)}")
            kept[name] = value
        elif not inert(name, value):
            problems.append(_not_known(name, value, prefix, fields, len(problems) < _HINTS))
    absent = [
        name
        for name, field in fields.items()
        if name not in kept
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if absent:
        names = ", ".join(repr(prefix + name) for name in absent)
        problems.append(f"{names} {'is' if len(absent) == 1 else 'are'} absent")
    if problems:
        raise ConfigError(f"{file}: " + joined(problems))
    return cls(**kept)


def ignored_fields(cls, values: Mapping[str, Any], where: str, released: Collection[str]):
    """Fields of a valid JSON object that are ignored, except those that released files have.

    Args:
      cls: the dataclass that `read` builds from the object.
      values: the JSON object.
      where: name of the object, which is put before each field; "" at the top level.
      released: fields of the released files.

    Returns:
      The names of the fields.
    """
    known = {field.name for field in dataclasses.fields(cls)} | set(released)
    prefix = f"{where}." if where else ""
    return [prefix + name for name in values if name not in known]


def read_pairs(value: Any, file: str = "config") -> tuple[tuple[int, int], ...]:
    """Reads `candidate_resolutions`, a list of [width, height] pairs of whole numbers.

    Args:
      value: the list.
      file: name of the file in error messages.

    Raises:
      ConfigError: it is not such a list.
    """

    def is_size(side: Any) -> bool:
        return type(side) is int and 0 < side <= MOST_PIXELS

    pairs = value if isinstance(value, list | tuple) else ()
    good = 0 < len(pairs) <= MOST_RESOLUTIONS
    for pair in pairs[:MOST_RESOLUTIONS]:
        good &= isinstance(pair, list | tuple) and len(pair) == 2 and all(map(is_size, pair))
    if not good:
        raise ConfigError(
            f"{file}: candidate_resolutions must be a list of [width, height] pairs (1 to"
            f" {MOST_RESOLUTIONS} pairs of 1 to {MOST_PIXELS} pixels), got {shown(value)}"
        )
    return tuple((width, height) for width, height in pairs)


def _not_known(name: str, value: Any, prefix: str, fields: Mapping, with_hint: bool) -> str:
    """The message for a field that may change the model in a way that is not known."""
    if name in NEUTRAL:
        known = " or ".join(map(repr, NEUTRAL[name]))
        return f"{prefix}{name} = {shown(value)} is not supported (only {known})"
    near = difflib.get_close_matches(name, fields, n=1) if with_hint else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown field {shown(prefix + name)}{hint}"


def _type_fits(value: Any, expected: Any) -> bool:
    """Whether a JSON value has the annotated type; an int counts as float, a bool not as int."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        return any(_type_fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_type_fits(part, args[0]) for part in value)
        return len(value) == len(args) and all(map(_type_fits, value, args))
    if isinstance(value, bool):
        return expected is bool
    if isinstance(value, int) and expected is float:
        return True
    return isinstance(value, expected)


def _type_name(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) else str(expected)


def write(config) -> dict[str, Any]:
    """Returns the fields of a dataclass, without optional fields that are None.

    Optional fields are those that only some released files have.
    """
    optional = {"lm_head", "rm_head", "torch_dtype", "transformers_version"}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {k: v for k, v in values.items() if not (k in optional and v is None)}
