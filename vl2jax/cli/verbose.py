"""What `--verbose` prints: compilations, and the implementation chosen for each operation."""

import logging
import sys

import jax

from vl2jax import ops

_LOGGED = ("Finished XLA compilation", "Persistent compilation cache hit")


def print_compilations_and_choices() -> None:
    """Prints to standard error what is compiled and why, and which implementations are chosen."""
    jax.config.update("jax_log_compiles", True)
    jax.config.update("jax_explain_cache_misses", True)
    logger = logging.getLogger("jax")
    logger.handlers, logger.propagate = [_Handler()], False
    ops.report_choices(lambda line: print(f"ops: {line}", file=sys.stderr))


class _Handler(logging.Handler):
    """Prints JAX's messages about the program, the time it took, and the cache miss."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        # A miss inside a program is part of tracing it.  A miss at the engine's call of a program
        # tells why it is compiled again.
        called = text.startswith("TRACING CACHE MISS") and "engine.py" in text.split("\n")[0]
        if called or text.startswith(_LOGGED):
            print(f"compile: {text}", file=sys.stderr)
