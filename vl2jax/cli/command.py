"""Shared by all command lines: the flag parser, and one-line error messages."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax

from vl2jax.common.errors import UserError

_INT32 = 2**31 - 1


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
            raise argparse.ArgumentTypeError(f"expected a whole number from {low}, got {text!r}")
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
    try:
        return body() or 0
    except BrokenPipeError:  # the reader of the output has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: not enough memory on the device; try {out_of_memory}", file=sys.stderr)
    return 1
