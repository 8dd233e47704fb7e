"""Information for bug reports: versions, machine, devices, settings, chosen implementations.

python -m vl2jax.env [--json]
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from vl2jax.cli.command import Parser, run_cli
from vl2jax.common.compilation_cache import default_directory
from vl2jax.common.progress import human_bytes
from vl2jax.common.version import version

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow"),
    *("tokenizers", "safetensors", "ml_collections", "absl-py"),
)
_PLUGINS = ("libtpu", "jax-cuda", "jax-rocm")  # prefixes of package names; listed if installed
_VARIABLES = ("JAX_", "XLA_", "VL2JAX_", "LIBTPU_", "CUDA_VISIBLE_DEVICES")  # prefixes, too
_TIMEOUT = 120  # seconds; initialising a device can block while another program holds it


def collect() -> dict[str, Any]:
    """Collects all sections, by name, as `--json` prints them."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        **_ask_devices(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "compilation cache": _cache(),
        "default dtypes": _dtypes(),
    }


def _versions() -> dict[str, str]:
    found = {"vl2jax": version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name.startswith(_PLUGINS):
            found[name] = distribution.version
    return found


def _machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = None
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable cores": usable,
        "memory": memory,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _cache() -> dict[str, Any]:
    """The folder of the compilation cache, and its number of files and bytes."""
    directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or default_directory())
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return {"folder": str(directory), "files": len(sizes), "bytes": sum(sizes)}


def _dtypes() -> dict[str, str]:
    """The dtypes that JAX gives Python numbers, and the precision of float32 matrix products."""
    precision = jax.config.values["jax_default_matmul_precision"]
    return {
        "float": jax.dtypes.canonicalize_dtype(float).name,
        "int": jax.dtypes.canonicalize_dtype(int).name,
        "float32 products": precision or "the platform's default",
    }


# A subprocess initialises the devices.  If a library aborts it, or waits for a device that another
# program holds, this process still prints the other sections.  The device is free again when the
# subprocess exits.


def _ask_devices() -> dict[str, Any]:
    """The sections `devices` and `operations`; if there are no devices, the reason in one line."""
    # By default, JAX would allocate most of the memory of a GPU.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    command = [sys.executable, "-c", "from vl2jax import env; env.answer()"]
    try:
        asked = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return _no_devices(f"no answer within {_TIMEOUT} seconds")
    answers = [json.loads(line) for line in asked.stdout.splitlines() if line.startswith("{")]
    found = {name: section for answer in answers for name, section in answer.items()}
    if "devices" not in found:
        lines = asked.stderr.strip().splitlines()
        return _no_devices(lines[-1] if lines else f"ended with exit code {asked.returncode}")
    if asked.returncode:  # the devices are fine, so this is a bug in vl2jax
        raise RuntimeError(asked.stderr)
    return found


def _no_devices(reason: str) -> dict[str, str]:
    return {
        "devices": f"could not be initialised: {reason}",
        "operations": "not known without devices",
    }


def answer() -> None:
    """Prints the devices, then the operations, as one JSON line each.

    `_ask_devices` runs this in a subprocess.
    """
    devices: list[dict[str, Any]] = []
    counts = Counter((device.platform, device.device_kind) for device in jax.devices())
    for (name, kind), count in counts.items():
        local = [d for d in jax.local_devices() if (d.platform, d.device_kind) == (name, kind)]
        memory = (local[0].memory_stats() or {}).get("bytes_limit") if local else None
        devices.append({"platform": name, "kind": kind, "count": count, "memory": memory})
    print(json.dumps({"devices": devices}), flush=True)

    from vl2jax.ops import registry

    operations = [
        {"operation": operation, "implementation": implementation, "reason": reason}
        for operation, implementation, reason in registry.describe_choices()
    ]
    print(json.dumps({"operations": operations}), flush=True)


def written(found: dict[str, Any]) -> str:
    """Formats the sections of `collect` as plain text."""
    parts = []
    for name, section in found.items():
        rows = section if isinstance(section, list) else [section]
        lines = [line for row in rows for line in _lines(row)]
        parts.append("\n".join([name, *(f"  {line}" for line in lines or ["none"])]))
    return "\n\n".join(parts)


def _lines(row: Any) -> list[str]:
    if isinstance(row, str):
        return [row]
    if "operation" in row:
        reason = f" ({row['reason']})" if row["reason"] else ""
        return [f"{row['operation']:<20} {row['implementation']}{reason}"]
    if "kind" in row:
        memory = f", {human_bytes(row['memory'])} each" if row["memory"] else ""
        return [f"{row['count']} x {row['kind']} ({row['platform']}){memory}"]
    return [f"{key:<20} {_value(key, value)}" for key, value in row.items()]


def _value(key: str, value: Any) -> str:
    return human_bytes(value) if key in ("memory", "bytes") and value is not None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""

    def run() -> None:
        parser = Parser("python -m vl2jax.env", __doc__)
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        args = parser.parse_args(argv)
        found = collect()
        print(json.dumps(found, indent=2) if args.json else written(found))

    return run_cli(run)


if __name__ == "__main__":
    raise SystemExit(main())
