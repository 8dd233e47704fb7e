"""Tests that every field of a run configuration is checked before anything is compiled."""

import dataclasses
import math
import typing

import pytest
from test_recipe import load

from vl2jax.common.errors import UserError
from vl2jax.training.run_config import RunConfig, read_run_config
from vl2jax.training.run_limits import CHOICES, RANGES


def sections():
    """Name and class of each section; "" is `RunConfig` itself."""
    yield "", RunConfig
    for name, hint in typing.get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(hint):
            yield name, hint


def numbers(cls) -> set[str]:
    """Fields of a dataclass that are numbers."""
    hints = typing.get_type_hints(cls)
    return {name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}}


def refusal(field: str, value) -> str:
    """Sets "section.field" of a whole configuration, and returns the error; "": none."""
    values = load("tiny").to_dict()
    section, _, name = field.rpartition(".")
    (values[section] if section else values)[name] = value
    try:
        read_run_config(values)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 600
        return str(error)
    return ""


def test_all_numbers_have_a_range():
    assert {name: numbers(cls) for name, cls in sections() if numbers(cls)} == {
        name: set(ranges) for name, ranges in RANGES.items()
    }


FIELDS = [f"{name}.{field}".lstrip(".") for name, fields in RANGES.items() for field in fields]


@pytest.mark.parametrize("field", FIELDS)
def test_every_number_is_checked(field):
    section, _, name = field.rpartition(".")
    allowed = RANGES[section][name]
    step = 0.001 if isinstance(allowed.low, float) else 1
    wrong = [allowed.low - step, allowed.high * 2 + 1, math.nan, math.inf, -math.inf, 10**400]
    wrong += [True, "1", [1], {}, None]
    wrong += [allowed.low] if allowed.above else []
    wrong += [allowed.high] if allowed.below else []
    for value in wrong:
        assert f"{field} must be " in refusal(field, value), value
    if not allowed.above and field not in ("mesh.data", "batch.tiles"):
        assert "must be" not in refusal(field, allowed.low).replace("must divide", "")


@pytest.mark.parametrize(
    "field", [f"{name}.{field}" for name, fields in CHOICES.items() for field in fields]
)
def test_every_choice_is_checked(field):
    section, _, name = field.rpartition(".")
    assert f"{field} must be one of " in refusal(field, "foo")
    assert f"{field} must be " in refusal(field, 7)
    for choice in CHOICES[section][name]:
        assert not refusal(field, choice)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("checkpoint.every", 0, "checkpoint.every must be at least 1, got 0"),
        ("eval.batches", 0, "eval.batches must be at least 1, got 0"),
        (
            "compute.moe_implementation",
            "foo",
            "compute.moe_implementation must be one of ",
        ),
        ("compute.remat", "dotz", "compute.remat must be one of none, full, dots"),
        ("compute.ops", "attention=foo", "attention"),
        ("data.preview", -2, "data.preview must be 0 to 10000, got -2"),
        ("optim.b1", 1.5, "optim.b1 must be at least 0 and below 1, got 1.5"),
        ("optim.b2", 1.0, "optim.b2 must be at least 0 and below 1, got 1.0"),
        ("optim.warmup_steps", -1, "optim.warmup_steps must be at least 0, got -1"),
        ("optim.lr", 0, "optim.lr must be above 0 and at most 1000, got 0"),
        ("optim.lr_multipliers", {"adaptor": -1}, "optim.lr_multipliers.adaptor must be 0 to"),
        ("optim.lr_multipliers", {"adaptor": "2"}, "optim.lr_multipliers.adaptor must be 0 to"),
        ("optim.lr_multipliers", {"adaptor": math.nan}, "optim.lr_multipliers.adaptor must be 0"),
        ("optim.frozen", (7,), "optim.frozen must be tuple"),
        ("batch.rows", 2**20, "more than 2147483647 tokens"),
        ("batch.microbatches", 7, "batch.microbatches 7 must divide batch.rows 6"),
        ("profile", "7", "profile must be START:STOP"),
        ("name", "../x", "name must be a name without '/'"),
        ("name", "", "name must be a name"),
        ("name", "x" * 300, "name must be a name"),
        ("chat_template", "x", "unknown field 'chat_template'"),
        ("optim.use_cache", None, "unknown field 'optim.use_cache'"),
    ],
)
def test_refused(field, value, words):
    change = {"length": 2**15} if field == "batch.rows" else {}
    values = load("tiny").to_dict()
    values["batch"] |= change
    section, _, name = field.rpartition(".")
    (values[section] if section else values)[name] = value
    with pytest.raises(UserError) as error:
        read_run_config(values)
    assert words in str(error.value)


def test_all_problems_are_said_together():
    values = load("tiny").to_dict()
    values["steps"], values["eval"]["batches"], values["compute"]["dtype"] = 0, -1, "fp8"
    with pytest.raises(UserError, match=r"steps .*; eval\.batches .*; compute\.dtype "):
        read_run_config(values)


def test_whole_numbers_are_numbers():
    values = load("tiny").to_dict()
    values["optim"] |= {"lr": 1, "lr_multipliers": {"adaptor": 2}, "clip_norm": 5}
    assert read_run_config(values).optim.lr_multipliers == {"adaptor": 2}


@pytest.mark.parametrize(
    ("steps", "log_every", "lines"),
    [(6, 0, 1), (10_000, 0, 1), (10_001, 0, 2), (200_000, 0, 20), (200_000, 1, 1), (6, 3, 3)],
)
def test_long_runs_write_every_nth_step(steps, log_every, lines):
    values = load("tiny").to_dict() | {"steps": steps, "log_every": log_every}
    assert read_run_config(values).steps_per_line == lines
