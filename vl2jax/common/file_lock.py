"""Locks on directories, so that only one process writes to each."""

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not Unix: no locking
    fcntl = None


def lock_directory(directory: Path, stack: contextlib.ExitStack) -> None:
    """Locks a directory until `stack` closes or the process ends, even if it is killed.

    Args:
      directory: an existing directory.
      stack: releases the lock when it closes.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the file system does not support locks.
    """
    if fcntl is None:
        return
    descriptor = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
