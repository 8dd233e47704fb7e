"""The commands that `pip install` makes."""

import importlib
import tomllib

import pytest
from conftest import ROOT

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_command_names_a_function(name):
    module, _, function = SCRIPTS[name].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", ["train", "sample", "eval"])
def test_a_command_is_the_program_of_the_same_name(name):
    program = importlib.import_module(f"vl2jax.programs.{name}")
    assert importlib.import_module(name).script is program.script
    assert SCRIPTS[f"vl2jax-{name}"] == f"{program.__name__}:script"
