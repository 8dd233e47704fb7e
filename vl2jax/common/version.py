"""The version, which stands in pyproject.toml."""

import importlib.metadata
import tomllib
from pathlib import Path


def version() -> str:
    """That of the source tree where this is one, installed or not; else of what is installed."""
    try:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return importlib.metadata.version("vl2jax")
    project = tomllib.loads(text).get("project", {})
    if project.get("name") != "vl2jax":  # someone else's, in whose folder this was put
        return importlib.metadata.version("vl2jax")
    return project["version"]
