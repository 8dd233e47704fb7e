"""Compiled programs, kept on the disk for the next run."""

import logging
import os
import sys
from pathlib import Path

import jax


def set_compilation_cache(directory: str | None) -> None:
    """Keeps compiled programs on the disk for the next run, unless `directory` is "off"."""
    if directory == "off" or (directory is None and jax.config.values["jax_compilation_cache_dir"]):
        return
    path = Path(directory) if directory else default_directory()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        if directory is not None:
            raise
        return  # it works without
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.01)


def default_directory() -> Path:
    """Where compiled programs are kept if nobody says where."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "vl2jax", "jax")


def show_compilations() -> None:
    """Says on standard error what is compiled, how long it took, and why it was needed anew."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().strip()
            # Misses inside a program are part of tracing it; those where one is called tell why.
            called = text.startswith("TRACING CACHE MISS") and "engine.py" in text.split("\n")[0]
            if called or text.startswith(_TOLD):
                print(f"compile: {text}", file=sys.stderr)

    jax.config.update("jax_log_compiles", True)
    jax.config.update("jax_explain_cache_misses", True)
    logger = logging.getLogger("jax")
    logger.handlers, logger.propagate = [Handler()], False


_TOLD = ("Finished XLA compilation", "Persistent compilation cache hit")
