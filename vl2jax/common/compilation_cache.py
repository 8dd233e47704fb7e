"""JAX's persistent compilation cache: where it is, and a log of compilations."""

import os
from pathlib import Path

import jax

from vl2jax.common.paths import user_path


def set_compilation_cache(directory: str | os.PathLike | None) -> None:
    """Turns on JAX's persistent compilation cache, so that later runs reuse compiled programs.

    Args:
      directory: the cache directory; "off" changes nothing; None: the directory that JAX is already
        configured with, else `default_directory()`.

    Raises:
      UserError: the given directory is not a path, see `user_path`.
      OSError: the given directory cannot be made.
    """
    if directory == "off" or (directory is None and jax.config.values["jax_compilation_cache_dir"]):
        return
    path = default_directory()
    if directory is not None:
        path = user_path(directory, "the compilation cache")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        if directory is not None:
            raise
        return  # the cache is optional
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.01)


def default_directory() -> Path:
    """Returns the default cache directory, `$XDG_CACHE_HOME/vl2jax/jax` or under `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "vl2jax", "jax")
