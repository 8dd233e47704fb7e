"""What all command lines share: flags that name a mistake, and errors on one line."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax

from vl2jax.common.errors import UserError

_INT32 = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving; flags are not abbreviated."""

    def __init__(self, prog: str, description: str | None):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def whole(low: int, high: int = _INT32) -> Callable[[str], int]:
    """A flag's type: whole numbers from `low` to `high`."""

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
    """Runs a command line; a user's mistake is one message, never a traceback.

    Args:
      body: the work; an exit code, or None for 0.
      out_of_memory: what to try when the device has not enough memory; "" leaves that error alone.
      interrupted: what Ctrl-C is answered with.

    Returns:
      The exit code: that of `body`, 1 after an error, 130 after Ctrl-C.
    """
    try:
        return body() or 0
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {'; '.join([str(error), *_notes(error)])}", file=sys.stderr)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: not enough memory on the device; try {out_of_memory}", file=sys.stderr)
    return 1


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way."""
    return getattr(error, "__notes__", [])
