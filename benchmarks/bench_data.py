"""Times the input pipeline of a configuration.

    python benchmarks/bench_data.py [--config configs/tiny.py] [--batches 100] [--workdir runs/tiny]

Prints one JSON line: batches, samples and tokens per second.  With `--workdir`, a run of the same
configuration, it also prints how many times faster the pipeline is than the train step.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

from vl2jax.parallel.mesh import AXES, batch_shards
from vl2jax.parallel.sharding import make_mesh
from vl2jax.processing.processor import Processor
from vl2jax.synthetic.tokens import write_processor_files
from vl2jax.training.metrics_file import read_metrics
from vl2jax.training.run_config import read_run_config
from vl2jax.training.setup import choose_architecture, make_data

WARM_UP = 10  # batches that are not timed, because some are prefetched


def read_config(path: str):
    """Reads a configuration file."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return read_run_config(module.get_config().to_dict())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--workdir", type=Path, help="workdir of a run to compare with")
    args = parser.parse_args()
    config = read_config(args.config)
    with tempfile.TemporaryDirectory() as folder:
        architecture = choose_architecture(config)
        write_processor_files(Path(folder), architecture)
        mesh = make_mesh(dict.fromkeys(AXES, 1) | {"data": -1})
        processor = Processor.from_dir(folder, architecture)
        feed = make_data(config, mesh, processor, print, pools=batch_shards(mesh))
        with contextlib.closing(iter(feed.pipelines[0])) as batches:
            for _ in range(WARM_UP):
                next(batches)
            start = time.perf_counter()
            packed = [next(batches) for _ in range(args.batches)]
            seconds = time.perf_counter() - start
    result = {
        "config": config.name,
        "threads": config.data.threads,
        "batches_per_s": round(args.batches / seconds, 2),
        "samples_per_s": round(sum(one.samples for one in packed) / seconds, 1),
        "tokens_per_s": round(sum(one.tokens for one in packed) / seconds),
    }
    if args.workdir:
        rows = read_metrics(args.workdir / "metrics.jsonl")
        step = statistics.median(row["perf/step_time"] for row in rows if "perf/step_time" in row)
        faster = args.batches / seconds * step
        result |= {"step_s": round(step, 3), "times_faster": round(faster, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
