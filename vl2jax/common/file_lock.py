"""Directories that one process at a time may write."""

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: two processes in one place are then not told apart
    fcntl = None


def lock_directory(directory: Path, stack: contextlib.ExitStack) -> None:
    """Takes a directory for this process, until `stack` closes or the process ends, however.

    Raises:
      BlockingIOError: another process has it.
      OSError: the file system has no locks.
    """
    if fcntl is None:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
