"""Glob patterns of data files."""

import glob
import os


def matches(path: str) -> list[str]:
    """Files and folders that a path or a glob pattern names, sorted.

    Folders at the beginning of the pattern that exist are taken as they are, so that the names of
    real folders may have the characters of patterns: `runs[1]/*.jsonl`.  Patterns match no hidden
    files.

    Args:
      path: a local path or a pattern.
    """
    if os.path.exists(path):
        return [path]
    literal, pattern = os.path.split(path)
    while literal and not os.path.isdir(literal):
        parent, name = os.path.split(literal)
        if parent == literal:
            break
        literal, pattern = parent, os.path.join(name, pattern)
    return sorted(glob.glob(os.path.join(glob.escape(literal), pattern), recursive=True))
