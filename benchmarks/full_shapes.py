"""Converts random checkpoints with the full shapes of a released size.

    python benchmarks/full_shapes.py make tiny /tmp/full/tiny             # 6.7 GB of random bf16
    python benchmarks/full_shapes.py make base /tmp/full/base --zeros     # 55 GB, sparse
    python benchmarks/full_shapes.py convert /tmp/full/tiny /tmp/full/out [--verify]
    python benchmarks/full_shapes.py back /tmp/full/out /tmp/full/hf
    python sample.py --ckpt /tmp/full/out --image examples/shapes.png --prompt "?" --json

`convert` and `back` run `python -m convert.to_jax` and `python -m convert.to_hf` as a user would,
and print one JSON line with time, rate and peak memory.  The peak memory is the maximum resident
set size of that process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from convert.random_hf import make_tokenizer
from convert.random_source import write_weights
from vl2jax.config import PRESETS
from vl2jax.synthetic.tokens import write_processor_files

SHARD_SIZE = 86 * 10**8


def make(size: str, directory: Path, zeros: bool) -> None:
    """Writes a checkpoint with random weights and the small tokenizer of the demo."""
    directory.mkdir(parents=True)
    start = time.monotonic()
    config = PRESETS[size]()
    nbytes = write_weights(directory, config, zeros=zeros, shard_size=SHARD_SIZE)
    write_processor_files(directory, config, make_tokenizer())
    seconds = time.monotonic() - start
    print(json.dumps({"made": size, "gb": nbytes / 1e9, "seconds": round(seconds, 1)}))


def measure(module: str, source: Path, out: Path, *flags: str) -> None:
    """Runs a conversion in a subprocess, and prints its time and memory."""
    nbytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", module, str(source), str(out), *flags]).returncode
    seconds = time.monotonic() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    result = {
        "command": " ".join((module, *flags)),
        "exit": code,
        "source_gb": round(nbytes / 1e9, 2),
        "seconds": round(seconds, 1),
        "source_mb_per_second": round(nbytes / 1e6 / seconds),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gb": round(usage.ru_maxrss * scale / 1e9, 2),
        "output_gb": round(sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / 1e9, 2),
    }
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("size", choices=PRESETS)
    making.add_argument("directory", type=Path)
    making.add_argument("--zeros", action="store_true")
    converting = commands.add_parser("convert")
    converting.add_argument("source", type=Path)
    converting.add_argument("out", type=Path)
    converting.add_argument("--verify", action="store_true")
    back = commands.add_parser("back")
    back.add_argument("source", type=Path)
    back.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        make(args.size, args.directory, args.zeros)
    elif args.command == "convert":
        measure("convert.to_jax", args.source, args.out, *["--verify"] * args.verify)
    else:
        measure("convert.to_hf", args.source, args.out)


if __name__ == "__main__":
    main()
