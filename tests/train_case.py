"""Runs train.py as a user does, and reads what it leaves."""

import os
import subprocess
import sys

import numpy as np
from conftest import ROOT

from vl2jax.checkpoints.param_store import ParamStore, read_array
from vl2jax.training.metrics_file import read_metrics


def command(workdir, *arguments: str, config: str = "tests/smallest.py") -> list[str]:
    cache = f"--compilation_cache={ROOT / '.cache' / 'train'}"
    named = [f"--config={config}", f"--workdir={workdir}", cache]
    return [sys.executable, "train.py", *named, *arguments]


def environment() -> dict[str, str]:
    """One device, not the eight of conftest.py; programs are compiled as by `quick_compilation`."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **quick}


def train(workdir, *arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workdir, *arguments, **kwargs),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def started(workdir, *arguments: str) -> subprocess.Popen:
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        command(workdir, *arguments), cwd=ROOT, env=environment(), stdout=nowhere, stderr=nowhere
    )


def curve(workdir) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return [(r["step"], r["train/loss"], r["train/grad_norm"]) for r in rows if "train/loss" in r]


def final_state(workdir, step: int) -> dict[str, np.ndarray]:
    directory = workdir / "checkpoints" / str(step)
    found = {}
    for item in ("params", "opt_state"):
        store = ParamStore(directory / item)
        found |= {f"{item}/{path}": read_array(store.open(path)) for path in store.paths}
    return found
