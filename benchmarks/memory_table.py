"""Memory that the released models take to answer: parameters and cache, as `--plan` counts.

    python benchmarks/memory_table.py [--rows 1]

Prints a table of the README.  Nothing is allocated; activations come on top.
"""

import argparse

import jax.numpy as jnp

from vl2jax.checkpoints.footprint import cache_bytes, parameter_bytes
from vl2jax.config import PRESETS

PAPER = {"tiny": 10, "small": 40, "base": 80}  # GB of the single GPU that it is to fit on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1, help="answered together (1)")
    rows = parser.parse_args().rows
    dtype = jnp.dtype("bfloat16")
    print("| | the paper's GPU | weights | parameters | cache | together |")
    print("|---|---|---|---|---|---|")
    for name, preset in PRESETS.items():
        config = preset()
        slots = config.decoder.max_position_embeddings
        cache = cache_bytes(config, dtype, rows, slots)
        for kind in (None, "int8"):
            size = parameter_bytes(config, dtype, kind)
            cells = [f"{x / 1e9:.2f} GB" for x in (size, cache, size + cache)]
            print(f"| {name} | {PAPER[name]} GB | {kind or dtype.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
