"""Shared by all command lines: the flag parser, and one-line error messages."""

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax

from vl2jax.cli.streams import abandon, open_closed_streams, say
from vl2jax.common.errors import UserError, clip, shown, storage_failure

_INT32 = 2**31 - 1
_MOST_LINES = 40  # of a message


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of exiting; flags cannot be abbreviated."""

    def __init__(self, prog: str, description: str | None):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def whole(low: int, high: int = _INT32) -> Callable[[str], int]:
    """Returns a parser of whole numbers from `low` to `high`, as the type of a flag."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            end = f" to {high}" if high < 2**64 else ""
            what = f"a whole number from {low}{end}, got {shown(text)}"
            raise argparse.ArgumentTypeError(f"expected {what}")
        return value

    return parse


def run_cli(
    body: Callable[[], int | None], *, out_of_memory: str = "", interrupted: str = "interrupted"
) -> int:
    """Runs a command line and prints user errors without a traceback.

    Args:
      body: the program; it returns an exit code, or None for 0.
      out_of_memory: advice to print if the device runs out of memory; "": that error is raised.
      interrupted: message after Ctrl-C.

    Returns:
      The exit code: that of `body`, 1 after an error, 130 after Ctrl-C.
    """
    closed = open_closed_streams()
    try:
        code = body() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output has closed the pipe, as `head` does
        abandon(sys.stdout)
        return 0
    except KeyboardInterrupt:
        say(f"\n{interrupted}")
        return 130
    except UserError as error:
        say(f"error: {_bounded(str(error))}")
    except OSError as error:
        if error.errno == errno.EBADF and "stdout" in closed:
            abandon(sys.stdout)
            say("error: standard output is closed; redirect it to a file, or to /dev/null")
        else:
            say(f"error: {clip(str(error), 1000)}")
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                return 1
            abandon(sys.stdout)  # else Python would try to flush it once more
    except MemoryError:
        say("error: not enough memory on this host")
    except Exception as error:
        message = _known_failure(error, out_of_memory)
        if message is None:
            raise
        say(f"error: {message}")
    return 1


def _known_failure(error: Exception, out_of_memory: str) -> str | None:
    """Describes an error of a library that is no bug; None if it may be one."""
    text = str(error)
    failure = storage_failure(error)
    is_memory = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in text
    if out_of_memory and is_memory and failure is None:
        return f"not enough memory on the device; try {out_of_memory}"
    if _is_of_platform(error):
        reason = clip(text.removesuffix(_JAX_ADVICE), 300) or "its package is not installed"
        return (
            f"JAX cannot start the platform of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
            f" ({reason}); unset JAX_PLATFORMS, or set it to a platform of this host, such as cpu"
        )
    return None if failure is None else f"{failure} ({clip(text, 500)})"


_JAX_ADVICE = " (set JAX_PLATFORMS='' to automatically choose an available backend)"


def _is_of_platform(error: Exception) -> bool:
    """Whether JAX raised an error because a platform does not exist or has no devices."""
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    # If no platform of JAX_PLATFORMS is left, an assertion without a message fails.
    return isinstance(error, AssertionError) and frames[-1].filename.endswith("xla_bridge.py")


def _bounded(text: str) -> str:
    """Bounds the message of a user error, which can be a list of problems."""
    lines = [clip(line, 2000) for line in text.splitlines()]
    more = [f"  - and {len(lines) - _MOST_LINES} more"] * (len(lines) > _MOST_LINES)
    return "\n".join(lines[:_MOST_LINES] + more)
