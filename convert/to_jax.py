"""Converts an original checkpoint into a vl2jax checkpoint directory.

    python -m convert.to_jax HF_DIR OUT_DIR [--dtype bfloat16|float32] [--dry_run] [--verify]

Tensors are read and written piece by piece, so the memory needed does not grow with the model.
"""

import collections
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert import mapping
from convert.finite import NonFinite
from convert.ownership import not_ours
from convert.pieces import Piece, chunk_shape, pieces
from convert.plan import Plan, describe, make_plan
from convert.source import LONG_NAMES, ConversionError
from convert.staging import map_ahead, run_on_cpu, staged_directory, write_failure
from convert.stopping import Stop, run_stoppable
from convert.writer import StreamedArray, save_streamed
from vl2jax.checkpoints import model_dir as checkpoint
from vl2jax.checkpoints.completeness import seal
from vl2jax.checkpoints.param_store import CheckpointError, ParamStore, read_array
from vl2jax.cli.command import Parser
from vl2jax.common.errors import UserError
from vl2jax.common.paths import local_path, path_flag
from vl2jax.common.progress import Progress

_MARGIN = 64 * 2**20  # bytes for metadata and small files


def streamed(
    plan: Plan, progress: Progress, stop: Stop, not_finite: NonFinite
) -> dict[str, StreamedArray]:
    """Returns the parameters as arrays whose values are converted while they are written.

    Args:
      plan: the conversion.
      progress: updated with the source bytes of each piece.
      stop: checked before each piece.
      not_finite: counts the values that are not finite.

    Returns:
      The arrays by parameter path.
    """

    def array(path: str, leaf: mapping.Leaf) -> StreamedArray:
        dtype = plan.dtypes[path]

        def slices() -> Iterator[tuple[tuple, np.ndarray]]:
            for piece in stop.each(pieces(leaf, dtype.itemsize)):
                values = plan.read(piece)
                not_finite.add(piece.entry.hf, values, math.prod(piece.entry.axes.shape))
                yield piece.index, piece.unsqueeze(values)
                progress.update(plan.source_bytes(piece))

        chunk = chunk_shape(leaf, dtype.itemsize)
        return StreamedArray(leaf.shape, dtype, chunk, slices)

    return {path: array(path, leaf) for path, leaf in plan.leaves.items()}


def verify(plan: Plan, params: Path, stop: Stop | None = None) -> None:
    """Reads the written parameters again, and compares each tensor with its source bit by bit.

    Args:
      plan: the conversion.
      params: directory of the written parameters.
      stop: checked before each piece.

    Raises:
      ConversionError: some tensors differ or cannot be read; lists all of them.
    """
    store = ParamStore(params)
    store.check({path: leaf.shape for path, leaf in plan.leaves.items()})
    problems: dict[str, str] = {}

    def work() -> Iterator[tuple]:
        for path, leaf in plan.leaves.items():
            stored = store.open(path)
            for piece in pieces(leaf, plan.dtypes[path].itemsize):
                yield stored, piece

    def compare(item: tuple) -> tuple[Piece, str | None]:
        stored, piece = item
        where = f"{piece.leaf.path}{list(piece.entry.index)}"
        try:
            values = piece.squeeze(read_array(stored, piece.index))
        except CheckpointError as error:
            return piece, f"{piece.entry.hf}: {where}: {error}"
        if _same_bits(values, plan.read(piece)):
            return piece, None
        return piece, f"{piece.entry.hf}: {where} differs"

    with Progress("verifying", plan.source_nbytes) as progress:
        for piece, problem in map_ahead(compare, (stop or Stop()).each(work())):
            if problem is not None:
                problems.setdefault(piece.entry.hf, problem)
            progress.update(plan.source_bytes(piece))
    if problems:
        raise ConversionError(f"{params} differs from the source", list(problems.values()))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether dtype, shape and all bits are equal, including those of NaNs and zeros."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(bits), b.view(bits))


def convert(
    hf_dir: Path,
    out: Path,
    *,
    dtype: str | None = None,
    check: bool = False,
    overwrite: bool = False,
    strict: bool = False,
) -> None:
    """Converts the checkpoint `hf_dir`, and writes it to the new directory `out`.

    What the user should know, such as weights that are not finite, is printed to standard error.

    Args:
      hf_dir: directory of the original checkpoint.
      out: the output directory.
      dtype: "bfloat16" or "float32"; None: the dtype of the source (float16 is stored as float32).
      check: whether to compare the result with the source before it is renamed to `out`.
      overwrite: whether to replace an older model at `out`, if a conversion wrote all of it.
      strict: whether weights that are not finite are an error.

    Raises:
      UserError: the source has problems, or `out` cannot be used.
      OSError: the source cannot be read, or the output cannot be written.
      Interrupted: Ctrl-C or another signal has stopped the conversion.
        After any error nothing is left at `out`; a note says if `OUT.partial` is left.
    """
    hf_dir, out = local_path(hf_dir, "hf_dir"), local_path(out, "out_dir")

    def work(stop: Stop) -> None:
        plan = make_plan(hf_dir, dtype)
        for note in plan.notes:
            _say(note)
        staged = staged_directory(out, plan.nbytes + _MARGIN, not_ours if overwrite else None)
        with plan.source, staged as partial:
            _fill(plan, hf_dir, partial, check, strict, stop)

    try:
        run_stoppable(work, out)
    except (ValueError, OSError) as error:
        if (failure := write_failure(error, out)) is not None:
            raise failure from error
        raise


def _fill(plan: Plan, hf_dir: Path, partial: Path, check: bool, strict: bool, stop: Stop) -> None:
    """Writes all files into an empty directory, the marker of a complete one last."""
    for name in (*checkpoint.REQUIRED_FILES, *checkpoint.OPTIONAL_FILES):
        if (hf_dir / name).is_file():
            shutil.copyfile(hf_dir / name, partial / name)
    with Progress("converting", plan.source_nbytes) as progress:
        not_finite = NonFinite()
        save_streamed(partial / checkpoint.PARAMS, streamed(plan, progress, stop, not_finite))
    if (report := not_finite.report()) is not None:
        if strict:
            raise UserError(f"{hf_dir}: {report}; without --strict they are converted as they are")
        _say(f"warning: {report}")
    if check:
        verify(plan, partial / checkpoint.PARAMS, stop)
    checkpoint.write_model_json(_record(plan, partial))
    seal(partial)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _record(plan: Plan, directory: Path) -> checkpoint.ModelDir:
    """The content of `model.json`."""
    stored: collections.Counter = collections.Counter()
    for path, leaf in plan.leaves.items():
        if not leaf.is_router_state:
            stored[plan.dtypes[path].name] += math.prod(leaf.shape)
    kept = [plan.source.tensors[x.hf] for leaf in plan.leaves.values() for x in leaf.entries]
    original: collections.Counter = collections.Counter()
    for info in kept:
        original[info.dtype] += info.nbytes
    usual = original.most_common(1)[0][0]
    present = (entry.hf for entry in plan.entries if entry.path is mapping.DROP)
    dropped = [name for name in present if name in plan.source.tensors]
    return checkpoint.ModelDir(
        path=directory,
        config=plan.config,
        dtype=stored.most_common(1)[0][0],
        source_dtype=LONG_NAMES[usual],
        source_dtypes={x.name: LONG_NAMES[x.dtype] for x in kept if x.dtype != usual},
        dropped=[{"tensors": dropped, "reason": mapping.DROP_REASON}] if dropped else [],
    )


def _main() -> None:
    parser = Parser("python -m convert.to_jax", __doc__)
    parser.add_argument(
        "hf_dir", type=path_flag(), help="original checkpoint (Hugging Face layout)"
    )
    parser.add_argument("out_dir", type=path_flag(), help="vl2jax checkpoint directory to write")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="dtype of the parameters; default: the source's",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check the source and print the mapping; write nothing",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result again and compare each tensor with its source",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an older converted model")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse weights that are not finite; default: convert and count them",
    )
    args = parser.parse_args()
    if args.dry_run:
        plan = make_plan(args.hf_dir, args.dtype)
        for note in plan.notes:
            _say(note)
        print(describe(plan))
        return
    convert(
        args.hf_dir,
        args.out_dir,
        dtype=args.dtype,
        check=args.verify,
        overwrite=args.overwrite,
        strict=args.strict,
    )
    print(f"wrote {args.out_dir}")


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run_on_cpu(_main)


if __name__ == "__main__":
    raise SystemExit(main())
