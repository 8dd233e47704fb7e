"""Compiled programs, kept on the disk for the next run."""

import os
from pathlib import Path

import jax


def set_compilation_cache(directory: str | None) -> None:
    """Keeps compiled programs on the disk for the next run, unless `directory` is "off"."""
    if directory == "off" or (directory is None and jax.config.jax_compilation_cache_dir):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(directory or os.path.join(home, "vl2jax", "jax"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        if directory is not None:
            raise
        return  # it works without
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
