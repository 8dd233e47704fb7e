"""Converts a vl2jax checkpoint back to the original Hugging Face layout.

    python -m convert.to_hf CKPT_DIR OUT_DIR [--dtype bfloat16|float32] [--shard_size 5GB]

Each tensor is written in the dtype of its source, so converting there and back is bit-exact.
CKPT_DIR may also be a training workdir (its newest checkpoint is used) or a step of one
(WORKDIR/checkpoints/500).  Then tensors are written in the dtype in which training stores them;
float32 master weights are twice as large as a bfloat16 release.  --dtype bfloat16 rounds them.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert import mapping
from convert.pieces import pieces
from convert.shards import TensorSpec, plan_shards, write_shards
from convert.source import NUMPY_DTYPES, SHORT_NAMES, some
from convert.staging import (
    map_ahead,
    parse_bytes,
    run_on_cpu,
    staged_directory,
    write_failure,
)
from convert.stopping import Stop, run_stoppable
from vl2jax.checkpoints import model_dir as checkpoint
from vl2jax.checkpoints.param_store import ParamStore, read_array
from vl2jax.cli.command import Parser
from vl2jax.common.errors import UserError
from vl2jax.common.paths import path_flag
from vl2jax.common.progress import Progress

_MARGIN = 64 * 2**20  # bytes for headers, index and small files


def convert(
    ckpt: Path, out: Path, *, shard_size: int = 5 * 10**9, dtype: str | None = None
) -> list[str]:
    """Converts the checkpoint `ckpt`, and writes it to the new directory `out`.

    Args:
      ckpt: a vl2jax checkpoint directory, a training workdir or a step of one.
      out: the output directory.
      shard_size: maximum number of bytes per safetensors file.
      dtype: "bfloat16" or "float32" for all tensors except the router's correction bias, which is
        float32.  None: the dtype of the source; for a workdir, the dtype that is stored.

    Returns:
      One line for each group of original tensors that are not written, because conversion to
      vl2jax dropped them.

    Raises:
      UserError: the checkpoint is invalid, values do not fit their dtype, or `out` cannot be used.
      OSError: the output cannot be written.
      Interrupted: Ctrl-C or another signal has stopped the conversion.
        After any error nothing is left at `out`; a note says if `OUT.partial` is left.
    """
    model = checkpoint.read_model_dir(ckpt)
    store = ParamStore(model.params)
    leaves = mapping.leaves(mapping.expand(model.config))
    store.check({path: leaf.shape for path, leaf in leaves.items()})
    dtypes = _dtypes(model, store, leaves, dtype)
    tensors = [
        TensorSpec(entry.hf, dtypes[entry.hf], entry.axes.hf_shape)
        for leaf in leaves.values()
        for entry in leaf.entries
    ]
    total = sum(tensor.nbytes for tensor in tensors)

    def work(stop: Stop) -> None:
        with (
            staged_directory(out, total + _MARGIN) as partial,
            Progress("writing", total) as progress,
        ):
            data = _values(store, leaves, dtypes, stop)
            write_shards(partial, plan_shards(tensors, shard_size), data, progress.update)
            _write_small_files(model, partial)

    try:
        run_stoppable(work, out)
    except OSError as error:
        raise write_failure(error, out) or error from error
    return [
        f"not written: {len(group['tensors'])} tensors ({some(group['tensors'], 3)}): conversion"
        f" left them out, because {group['reason']}"
        for group in model.dropped
    ]


def _dtypes(model, store: ParamStore, leaves, wanted: str | None) -> dict[str, str]:
    """Output dtype of each original tensor by name, as safetensors names it."""
    found = {}
    for path, leaf in leaves.items():
        one = wanted
        if wanted is not None and leaf.is_router_state:
            one = "float32"
        elif wanted is None and model.step is not None:
            one = store.open(path).dtype.name
        for entry in leaf.entries:
            found[entry.hf] = SHORT_NAMES[one] if one else _source_dtype(model, entry.hf)
    return found


def _source_dtype(model: checkpoint.ModelDir, name: str) -> str:
    """Dtype of a tensor in its source, as safetensors names it."""
    found = model.source_dtypes.get(name, model.source_dtype)
    if found not in SHORT_NAMES:
        raise UserError(
            f"{model.path / checkpoint.MODEL_FILE}: {name} has source dtype {found!r};"
            f" expected one of {', '.join(SHORT_NAMES)}"
        )
    return SHORT_NAMES[found]


def _values(store: ParamStore, leaves, dtypes: dict[str, str], stop: Stop) -> Iterator[np.ndarray]:
    """Values of all tensors in the original layout, in pieces, in the order of the leaves."""

    def work() -> Iterator[tuple]:
        for path, leaf in leaves.items():
            stored = store.open(path)
            for piece in pieces(leaf, stored.dtype.numpy_dtype.itemsize):
                yield stored, piece

    def read(item: tuple) -> np.ndarray:
        stored, piece = item
        values = piece.entry.axes.backward(piece.squeeze(read_array(stored, piece.index)))
        name = piece.entry.hf
        return _cast(values, NUMPY_DTYPES[dtypes[name]], name)

    yield from map_ahead(read, stop.each(work()))


def _cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts values; raises UserError if float32 values exceed the range of float16."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if (
        dtype == np.float16
        and values.dtype != dtype
        and not np.array_equal(np.isfinite(cast), np.isfinite(values))
    ):
        raise UserError(f"{name}: values beyond 65504 do not fit its source dtype float16")
    return cast


def _write_small_files(model: checkpoint.ModelDir, directory: Path) -> None:
    for name in (*checkpoint.REQUIRED_FILES, *checkpoint.OPTIONAL_FILES):
        if (model.path / name).is_file():
            shutil.copyfile(model.path / name, directory / name)
    text = json.dumps(model.config.to_hf(), indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def _main() -> None:
    parser = Parser("python -m convert.to_hf", __doc__)
    parser.add_argument(
        "ckpt_dir",
        type=path_flag(remote=True),
        help="vl2jax checkpoint directory, training workdir or step of one",
    )
    parser.add_argument("out_dir", type=path_flag(), help="Hugging Face directory to write")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of the output; default: the source's, or for a workdir the stored one",
    )
    parser.add_argument("--shard_size", default="5GB", help="maximum bytes per file (default 5GB)")
    args = parser.parse_args()
    try:
        shard_size = parse_bytes(args.shard_size)
    except ValueError as error:
        parser.error(f"--shard_size: {error}")
    notes = convert(args.ckpt_dir, args.out_dir, shard_size=shard_size, dtype=args.dtype)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"wrote {args.out_dir}")


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_on_cpu(_main)


if __name__ == "__main__":
    raise SystemExit(main())
