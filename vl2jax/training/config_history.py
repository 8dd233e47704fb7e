"""The configurations of a run: of its newest start, and of every start.

config.json             the newest start
configs/STEP-TIME.json  one start each: the step that it continued after, and the time in UTC
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vl2jax.common.atomic_file import write_json
from vl2jax.common.errors import UserError, clip
from vl2jax.training.run_config import RunConfig, read_run_config

CONFIG_FILE, HISTORY = "config.json", "configs"
_SHOWN = 60  # characters of a value in a message
_ABSENT = "not set"


def config_changes(workdir: Path, config: RunConfig) -> list[str]:
    """Compares a configuration with that of the newest start of a workdir.

    Args:
      workdir: the workdir; it need not exist.
      config: the configuration of the start that comes now.

    Returns:
      A line for each field that differs: `optim.lr: 0.001 -> 0.0005`.
    """
    old = _read(workdir / CONFIG_FILE)
    if old is None:
        return []
    # Fields that are newer than the file get their defaults, unless others no longer exist.
    with contextlib.suppress(UserError):
        old = _plain(read_run_config(old))
    before, after = _flat(old), _flat(_plain(config))
    names = [*after, *(name for name in before if name not in after)]
    return [
        f"{name}: {_show(before, name)} -> {_show(after, name)}"
        for name in names
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def record_start(workdir: Path, config: RunConfig, step: int) -> None:
    """Writes the configuration of a start; nothing new for a repeated start at the same step.

    Args:
      workdir: the workdir.
      config: the configuration.
      step: the step that the run continues after; 0: it begins.
    """
    content, history = _plain(config), workdir / HISTORY
    old = _read(workdir / CONFIG_FILE)
    if old is not None and not history.is_dir():  # a run that was started without a history
        history.mkdir()
        write_json(history / f"{0:08}-earlier.json", old)
    history.mkdir(exist_ok=True)
    same_step = sorted(path for path in history.iterdir() if path.name.startswith(f"{step:08}-"))
    if not same_step or _read(same_step[-1]) != content:
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        write_json(history / f"{step:08}-{moment}.json", content)
    write_json(workdir / CONFIG_FILE, content)


def _plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON gives it back: lists in the place of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _read(path: Path) -> dict[str, Any] | None:
    """Reads a configuration; None if there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _show(values: Mapping[str, Any], name: str) -> str:
    return clip(json.dumps(values[name]), _SHOWN) if name in values else _ABSENT
