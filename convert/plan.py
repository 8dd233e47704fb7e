"""Plans a conversion: checks the source and reports all problems before anything is written."""

import collections
import contextlib
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert import mapping
from convert.pieces import Piece
from convert.quantised import describe_quantised
from convert.source import NUMPY_DTYPES, SHORT_NAMES, ConversionError, Source, scan, some
from vl2jax.checkpoints import model_dir as checkpoint
from vl2jax.common.errors import UserError, shown
from vl2jax.common.json_file import HEAD, not_downloaded, read_object
from vl2jax.common.progress import human_bytes
from vl2jax.config import VL2Config
from vl2jax.config.processor import CONFIG_FILE, ProcessorConfig
from vl2jax.processing.model_files import file_problems

_MOST_SHAPES = 8  # tensors of a wrong shape that are listed
# Files that `file_problems` has read.
_READ_BY_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json")


class Plan:
    """A checked conversion.

    Attributes:
      config: architecture.
      source: the original tensors.
      entries: all original tensors of the model, and their destinations.
      leaves: all parameters by path.
      requested: requested dtype of the parameters; None: as in the source.
      notes: what the user should know, one line each.
    """

    def __init__(
        self, config: VL2Config, source: Source, dtype: str | None, notes: Sequence[str] = ()
    ):
        self.config = config
        self.source = source
        self.entries = mapping.expand(config)
        self.leaves = mapping.leaves(self.entries)
        self.requested = dtype
        self.notes = tuple(notes)

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """Dtype of each parameter: the requested one, else one that holds its tensors exactly."""
        return {path: self._dtype(leaf) for path, leaf in self.leaves.items()}

    def _dtype(self, leaf: mapping.Leaf) -> np.dtype:
        if leaf.is_router_state:
            return NUMPY_DTYPES["F32"]
        if self.requested is not None:
            return NUMPY_DTYPES[SHORT_NAMES[self.requested]]
        held = {self.source.tensors[entry.hf].dtype for entry in leaf.entries}
        return NUMPY_DTYPES["BF16" if held == {"BF16"} else "F32"]

    @property
    def nbytes(self) -> int:
        """Size of the parameters in bytes, without compression."""
        return sum(math.prod(x.shape) * self.dtypes[p].itemsize for p, x in self.leaves.items())

    @property
    def source_nbytes(self) -> int:
        """Number of bytes that are read from the source."""
        return sum(
            self.source.tensors[entry.hf].nbytes
            for leaf in self.leaves.values()
            for entry in leaf.entries
        )

    def read(self, piece: Piece) -> np.ndarray:
        """Reads a piece of an original tensor and converts it to our layout and dtype."""
        values = self.source.read(piece.entry.hf, piece.start, piece.stop)
        values = values.astype(self.dtypes[piece.leaf.path], copy=False)
        return piece.entry.axes.forward(values)

    def source_bytes(self, piece: Piece) -> int:
        """Returns the number of bytes of a piece in the source."""
        info = self.source.tensors[piece.entry.hf]
        return info.nbytes * (piece.stop - piece.start) // info.shape[0]


def make_plan(hf_dir: Path, dtype: str | None) -> Plan:
    """Reads the config and the safetensors headers of an original checkpoint, and checks them.

    Args:
      hf_dir: directory of the original checkpoint.
      dtype: "bfloat16" or "float32"; None: as in the source.

    Raises:
      UserError: `hf_dir` is not a directory, or is a vl2jax checkpoint.
      ConversionError: the checkpoint has problems; lists all of them.
    """
    if not hf_dir.is_dir():
        what = "is not a directory" if hf_dir.exists() else "does not exist"
        raise UserError(f"{hf_dir} {what}; expected a Hugging Face checkpoint directory")
    if (hf_dir / checkpoint.MODEL_FILE).exists():
        raise UserError(
            f"{hf_dir} is already a vl2jax checkpoint; expected a Hugging Face checkpoint"
        )
    problems: list[str] = []
    config, ignored = _read_config(hf_dir, problems)
    found = file_problems(hf_dir, config)
    for text in found:  # the report says the directory once
        problems.append(text.removeprefix(f"{hf_dir}{os.sep}").removeprefix(f"{hf_dir}: "))
    problems += _placeholders(hf_dir)
    source, found = scan(hf_dir)
    problems += found
    if config is None:
        raise ConversionError(str(hf_dir), problems)
    plan = Plan(config, source, dtype, ignored)
    problems += _compare(plan.entries, source)
    if problems:
        raise ConversionError(str(hf_dir), problems)
    return plan


def _read_config(hf_dir: Path, problems: list[str]) -> tuple[VL2Config | None, list[str]]:
    """Reads `config.json`, and names the fields of it and the processor's that are ignored."""
    try:
        content = read_object(hf_dir / "config.json")
        config = VL2Config.from_hf(content)
    except UserError as error:
        problems.append(str(error).removeprefix(f"{hf_dir}{os.sep}"))
        return None, []
    ignored = {"config.json": VL2Config.ignored_fields(content)}
    with contextlib.suppress(UserError):  # `file_problems` reports it
        settings = read_object(hf_dir / CONFIG_FILE)
        ignored[CONFIG_FILE] = ProcessorConfig.ignored_fields(settings)
    return config, [
        f"{name}: ignored, because they do not change the model: {some(fields, 20)}"
        for name, fields in ignored.items()
        if fields
    ]


def _placeholders(hf_dir: Path) -> list[str]:
    """Returns one message for each small file that would be copied but is not the file itself."""
    problems = []
    for name in checkpoint.OPTIONAL_FILES:
        if (hf_dir / name).is_file():
            with (hf_dir / name).open("rb") as file:
                instead = not_downloaded(file.read(HEAD))
            if instead is not None and name not in _READ_BY_TOKENIZER:
                problems.append(f"{name}: {instead}")
    return problems


def _compare(entries: list[mapping.Entry], source: Source) -> list[str]:
    """Compares the tensors of a checkpoint with those of the model; returns the problems."""
    expected = {entry.hf: entry for entry in entries}
    quantised = describe_quantised(source.tensors, expected)
    if quantised is not None:
        return [quantised]
    problems = []
    if source.unreadable is not None:
        needed = {entry.hf for entry in entries if entry.path is not mapping.DROP}
        missing = needed - source.tensors.keys() - source.unreadable
        if missing:
            names = [entry.hf for entry in entries if entry.hf in missing]
            problems.append(f"missing tensors ({len(names)}): {some(names)}")
    surplus = [name for name in source.tensors if name not in expected]
    if surplus:
        problems.append(f"tensors the model does not have ({len(surplus)}): {some(surplus)}")
    shapes, dtypes = [], collections.defaultdict(list)
    for name, entry in expected.items():
        info, wanted = source.tensors.get(name), entry.axes.hf_shape
        if info is not None and info.shape != wanted:
            shapes.append(f"{name}: shape {shown(list(info.shape))}, the model has {list(wanted)}")
        if info is not None and info.dtype not in NUMPY_DTYPES:
            dtypes[info.dtype].append(name)
    problems += shapes[:_MOST_SHAPES]
    if len(shapes) > _MOST_SHAPES:
        problems.append(f"{len(shapes) - _MOST_SHAPES} more tensors have another shape")
    for dtype, names in dtypes.items():
        known = ", ".join(NUMPY_DTYPES)
        problems.append(f"dtype {dtype} ({len(names)}): {some(names)}; expected one of {known}")
    return problems


def describe(plan: Plan) -> str:
    """Formats the mapping of a checkpoint as text, one line per row of the table and parameter."""
    groups = collections.Counter((entry.row.hf, entry.path) for entry in plan.entries)
    first = {}
    for entry in plan.entries:
        first.setdefault((entry.row.hf, entry.path), entry)
    lines = []
    for (hf, path), count in groups.items():
        entry = first[hf, path]
        name = hf if count > 1 else entry.hf
        left = f"{count:5} x {name} {list(entry.axes.hf_shape)}"
        if path is None:
            lines.append(f"{left} -> dropped")
        else:
            leaf = plan.leaves[path]
            lines.append(
                f"{left} -> {path} {plan.dtypes[path].name}{list(leaf.shape)}   ({entry.row.axes})"
            )
    lines.append(f"dropped: {mapping.DROP_REASON}")
    lines.append(
        f"{len(plan.entries)} tensors, {human_bytes(plan.source_nbytes)} to read ->"
        f" {len(plan.leaves)} parameters, {human_bytes(plan.nbytes)}"
    )
    return "\n".join(lines)
