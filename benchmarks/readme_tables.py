"""Makes the tables of parameters and memory of the released sizes in README.md, from shapes.

    python benchmarks/readme_tables.py             # prints the tables
    python benchmarks/readme_tables.py --write     # replaces the tables in README.md

Nothing is allocated.  The memory table does not include activations.
"""

import argparse
import math
import pathlib
import re

import jax
import jax.numpy as jnp

from vl2jax.checkpoints.footprint import cache_bytes, parameter_bytes
from vl2jax.config import PRESETS
from vl2jax.model.vl2 import abstract_params

README = pathlib.Path(__file__).parent.parent / "README.md"
NAMES = {"tiny": "Tiny", "small": "Small", "base": "base"}
PAPER = {"tiny": 10, "small": 40, "base": 80}  # memory of the single GPU, in GB


def parameters_table() -> str:
    """Formats parameters, bytes, attention and router of each released size."""
    configs = [preset() for preset in PRESETS.values()]
    sizes = [
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))
        for config in configs
    ]
    dtype = jnp.dtype("bfloat16")
    routers = [
        "softmax" if c.decoder.scoring_func == "softmax" else "sigmoid, correction bias"
        for c in configs
    ]
    return markdown(
        [
            ["", "DeepSeek-VL2-Tiny", "DeepSeek-VL2-Small", "DeepSeek-VL2 (base)"],
            ["parameters", *(f"{size / 1e9:.2f} B" for size in sizes)],
            ["bfloat16 weights", *(f"{parameter_bytes(c, dtype) / 1e9:.1f} GB" for c in configs)],
            ["attention", *("MLA" if c.decoder.use_mla else "multi-head" for c in configs)],
            ["router", *routers],
        ]
    )


def memory_table(rows: int = 1) -> str:
    """Formats the bytes of the parameters, and of the caches of `rows` sequences of full length."""
    dtype = jnp.dtype("bfloat16")
    lines = [["", "the paper's GPU", "weights", "parameters", "cache", "together"]]
    for name, preset in PRESETS.items():
        config = preset()
        cache = cache_bytes(config, dtype, rows, config.decoder.max_position_embeddings)
        for kind in (None, "int8"):
            size = parameter_bytes(config, dtype, kind)
            cells = [f"{x / 1e9:.2f} GB" for x in (size, cache, size + cache)]
            lines.append([NAMES[name], f"{PAPER[name]} GB", kind or dtype.name, *cells])
    return markdown(lines)


def markdown(rows: list[list[str]]) -> str:
    """Formats a Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def between_marks(text: str, name: str) -> str:
    """Returns the text between the marks `<!-- NAME -->` and `<!-- end -->`."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    if found is None:
        raise SystemExit(f"there is no mark <!-- {name} -->")
    return found[1].strip()


def put(path: pathlib.Path, name: str, table: str) -> None:
    """Replaces the text between the marks `<!-- NAME -->` and `<!-- end -->` of a file."""
    text = path.read_text()
    between_marks(text, name)
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    path.write_text(mark.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write them to README.md")
    parser.add_argument("--rows", type=int, default=1, help="batch size for the caches (1)")
    args = parser.parse_args()
    for name, table in (("parameters", parameters_table()), ("memory", memory_table(args.rows))):
        if args.write:
            put(README, name, table)
        else:
            print(table, end="\n\n")


if __name__ == "__main__":
    main()
