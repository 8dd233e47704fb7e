"""Writes JSON files so that a crash leaves no half of one."""

import json
import os
from typing import Any

from vl2jax.common.paths import AnyPath, is_remote


def write_json(path: AnyPath, content: Any) -> None:
    """Writes a JSON file atomically: after a crash, the file has its old or its new content."""
    text = json.dumps(content, indent=1) + "\n"
    if is_remote(path):  # an object is replaced as a whole
        path.write_text(text)
        return
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
