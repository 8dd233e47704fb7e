"""The version of vl2jax, which is set in `pyproject.toml`."""

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    """Returns the version in the source tree's `pyproject.toml`, else of the installed package."""
    try:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return importlib.metadata.version("vl2jax")
    project = tomllib.loads(text).get("project", {})
    if project.get("name") != "vl2jax":  # pyproject.toml of another project that contains this one
        return importlib.metadata.version("vl2jax")
    return project["version"]
