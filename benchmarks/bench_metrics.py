"""Times what the metrics of a long run cost: writing, resuming, the closing plot.

    python benchmarks/bench_metrics.py DIR [--steps 200000] [--layers 29]

Writes metrics.jsonl as a run of vl2_base with a line for each step would, unless DIR has it.  Then
it resumes 100 steps before the end, writes those steps again, and closes the log.  Prints one JSON
line: bytes of a step in both files, milliseconds to write one, seconds to resume and to close.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np

from vl2jax.training.metrics_log import MetricsLog

LAYERED = ("bias_norm", "dead_experts", "entropy", "max_violation")
SINGLE = ("aux_loss", "grad_norm", "loss", "lr", "param_norm", "token_acc")
PERF = ("step_time", "tokens_per_sec", "images_per_sec", "data_wait", "tflops_per_device", "mfu")
AGAIN = 100  # steps that are written again


def metrics(dice: np.random.Generator, layers: int) -> dict:
    """The metrics of a step, with the types that a training step gives."""
    return {
        **{f"moe/{name}": dice.random(layers, np.float32) for name in LAYERED},
        **{f"train/{name}": dice.random((), np.float32) for name in SINGLE},
        **{f"perf/{name}": dice.random() for name in PERF},
        **{f"data/{name}": dice.random() for name in ("token_fill", "tile_fill", "tile_imbalance")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=Path)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--layers", type=int, default=29)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    dice, path = np.random.default_rng(0), args.dir / "metrics.jsonl"
    if not path.exists():
        with path.open("w") as file:
            for step in range(1, args.steps + 1):
                line = {
                    name: np.asarray(value, float).tolist()
                    for name, value in metrics(dice, args.layers).items()
                }
                if step % 200 == 0:
                    line["heldout/loss"] = line["heldout/token_acc"] = 0.5
                file.write(json.dumps({"step": step} | line) + "\n")
    before = path.stat().st_size
    begun, began = args.steps - AGAIN, time.perf_counter()
    log = MetricsLog(args.dir, total_steps=args.steps, start_step=begun, stream=io.StringIO())
    resumed = time.perf_counter()
    kept = path.stat().st_size
    for step in range(begun + 1, args.steps + 1):
        log.write(step, metrics(dice, args.layers))
    written = time.perf_counter()
    log.close()
    closed = time.perf_counter()
    events = max(args.dir.glob("events.*"), key=lambda file: file.stat().st_mtime)
    result = {
        "steps": args.steps,
        "file_mb": round(before / 1e6),
        "bytes_per_step": [
            round((path.stat().st_size - kept) / AGAIN),
            round(events.stat().st_size / AGAIN),
        ],
        "write_ms": round((written - resumed) / AGAIN * 1e3, 2),
        "resume_s": round(resumed - began, 2),
        "close_s": round(closed - written, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
