"""Writes JSON files so that a crash leaves no half of one."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically: after a crash, the file has its old or its new content."""
    text = json.dumps(content, indent=1) + "\n"
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
