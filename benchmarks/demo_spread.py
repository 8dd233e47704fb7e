"""Trains and evaluates the demo (`configs/tiny.py`) with several seeds.

    python benchmarks/demo_spread.py --seeds 0 1 2      # adds runs to benchmarks/demo.jsonl
    python benchmarks/demo_spread.py --table            # prints a table of the recorded runs

For each seed, it runs `train.py` and then `eval.py` (400 held-out questions of each family), as a
user would.  It records one JSON line per run: machine, versions, wall time, memory, scores.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

import jax
from readme_tables import README, markdown, put

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "demo.jsonl"
WORDS = ("colour", "shape", "count", "digit")


def processor_name() -> str:
    """Model name of the processor, with its best vector extension."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = dict(line.split("\t: ", 1) for line in text.splitlines() if "\t: " in line)
    flags = lines.get("flags", "").split()
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{lines.get('model name', platform.processor()).strip()} {best}".strip()


def run(seed: int, questions: int, steps: int | None, workdir: pathlib.Path) -> dict:
    """Trains and evaluates one seed; returns the record of the run."""
    train = ["train.py", "--config=configs/tiny.py", f"--config.seed={seed}"]
    train += [f"--workdir={workdir}"] + ([f"--config.steps={steps}"] if steps else [])
    started = time.monotonic()
    subprocess.run([sys.executable, *train], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    ask = ["eval.py", "--ckpt", workdir, "--data", "synthetic", "--json"]
    ask += ["--questions", str(questions)]
    said = subprocess.run(
        [sys.executable, *map(str, ask)], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    last = (workdir / "metrics.jsonl").read_text().splitlines()[-1]
    scores = json.loads(said.stdout)
    return {
        "seed": seed,
        "steps": json.loads(last)["step"],
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "minutes": round(seconds / 60, 1),
        "peak_gb": round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2),
        "questions": questions,
        "summary": {name: round(found["value"], 4) for name, found in scores["summary"].items()},
        "families": {
            name: round(found["acc50"] if found["acc50"] is not None else found["exact_match"], 4)
            for name, found in scores["families"].items()
        },
        "max_violation": json.loads(last)["moe/max_violation"],
    }


def kept() -> list[dict]:
    """The recorded runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def table(runs: list[dict]) -> str:
    """Formats a table with one row per run."""
    rows = [["seed", "machine", "jax", "minutes", "GB", *WORDS, "boxes", "absent refused"]]
    for one in runs:
        parts = [f"{one['families'][name]:.1%}" for name in WORDS]
        parts += [f"{one['summary'][name]:.1%}" for name in ("acc50", "refused")]
        where = f"{one['cores']} x {one['machine']}"
        rows.append([str(one["seed"]), where, one["jax"], str(one["minutes"]), str(one["peak_gb"])])
        rows[-1] += parts
    return markdown(rows)


def sentence(runs: list[dict]) -> str:
    """The text of README.md about the demo, with the ranges over the recorded runs."""

    def spread(name: str) -> str:
        values = [round(100 * one["summary"][name]) for one in runs]
        low, high = min(values), max(values)
        return f"{low}%" if low == high else f"{low}% to {high}%"

    minutes = [round(one["minutes"]) for one in runs]
    took = f"{min(minutes)}" if len(set(minutes)) == 1 else f"{min(minutes)} to {max(minutes)}"
    count = "one run" if len(runs) == 1 else f"{len(runs)} runs"
    return (
        f"The demo trains a small model from random weights for {runs[0]['steps']} steps, which"
        f" takes {took} minutes\non two cores.  On held-out images, the model then answers"
        f" {spread('exact_match')} of the questions about\ncolours, shapes, counts and digits"
        f" correctly.  Its boxes are correct (IoU of at least 0.5) for\n{spread('acc50')} of the"
        f" grounding questions, and it recognises {spread('refused')} of the absent objects as"
        f" absent\n({count}: `python benchmarks/demo_spread.py --table`)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--questions", type=int, default=400, help="questions per family (400)")
    parser.add_argument(
        "--steps", type=int, help="number of training steps (that of the configuration)"
    )
    parser.add_argument("--keep", type=pathlib.Path, help="keep the working directories here")
    parser.add_argument(
        "--table", action="store_true", help="only print the table of recorded runs"
    )
    args = parser.parse_args()
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            workdir = (args.keep or pathlib.Path(folder)) / f"seed-{seed}"
            found = json.dumps(run(seed, args.questions, args.steps, workdir.absolute()))
        print(found, flush=True)
        with RESULTS.open("a") as file:
            file.write(found + "\n")
    runs = kept()
    print(table(runs))
    if args.seeds:
        put(README, "demo", sentence(runs))


if __name__ == "__main__":
    main()
