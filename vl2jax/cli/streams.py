"""Standard input, output and error of a program that may have been started without them."""

import contextlib
import io
import os
import sys
from typing import TextIO

_STREAMS = (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))


def open_closed_streams() -> frozenset[str]:
    """Opens the standard streams that were closed when the program started (`<&-`, `>&-`, `2>&-`).

    Otherwise the next file that is opened gets the number of a closed stream, and libraries print
    into it.  A closed standard input is then empty, and what is written to a closed standard error
    is lost.  Writing to a closed standard output fails, because results would be lost.

    Standard output can then print any file name, whatever the locale.

    Returns:
      The streams that were closed, of "stdin", "stdout" and "stderr".
    """
    closed = set()
    for number, (name, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is not None:
            continue
        closed.add(name)
        try:
            os.fstat(number)  # another file may have got the number by now
            descriptor = os.open(os.devnull, mode)
        except OSError:
            descriptor = os.open(os.devnull, mode)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
                descriptor = number
        kind = "r" if name == "stdin" else "w"
        setattr(sys, name, os.fdopen(descriptor, kind, encoding="utf-8", errors="replace"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    return frozenset(closed)


def say(text: str) -> None:
    """Prints a line to standard error; does nothing if that cannot be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """Drops what a stream has not written and will not be able to write."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
