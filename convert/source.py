"""Reads an original checkpoint: finds the tensors in its safetensors files, and reads each by name.

Files are read with `pread`.  The library `safetensors` is not used, because it maps files into
memory: pages that were read would count as memory of the process, and an I/O error or a truncated
file would kill the process without a message (SIGBUS).
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vl2jax.common.errors import UserError, clip, listed, shown
from vl2jax.common.json_file import HEAD, not_downloaded, parse_object, read_object

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Dtypes: names in safetensors, in numpy, and in this project.
NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
LONG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHORT_NAMES = {long: short for short, long in LONG_NAMES.items()}
# Bits of an element, of all dtypes that safetensors has.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
_BITS |= {"I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}
_BITS |= {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_MAX_HEADER = 2**25  # bytes; a header of 250,000 tensors has about as many
_MAX_INDEX = 2**25
_MAX_AXES, _MAX_SIDE = 16, 2**48  # of a shape


class ConversionError(UserError):
    """All problems of a checkpoint: on one line, or a list of them.

    Attributes:
      problems: one message for each problem.
    """

    def __init__(self, what: str, problems: list[str]):
        """Makes the error.

        Args:
          what: the checkpoint.
          problems: one message for each problem.
        """
        many = f"{len(problems)} problems\n{listed(problems)}"
        super().__init__(f"{what}: " + (many if len(problems) > 1 else clip(problems[0], 2000)))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in a safetensors file.

    Attributes:
      name: name of the tensor.
      file: the file.
      dtype: dtype, as safetensors names it.
      shape: shape.
      offset: position of the data in the file, in bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return _nbytes(self.dtype, self.shape)


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BITS[dtype] // 8


class Source:
    """The tensors of a Hugging Face directory; keeps one open file per shard.

    Attributes:
      tensors: the tensors by name.
      unreadable: names of tensors that may exist, but in files that could not be read; None: all
        names.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], unreadable: Set[str] | None):
        self.tensors = dict(tensors)
        self.unreadable = unreadable
        self._files: dict[Path, int] = {}

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_):
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads a tensor, or rows `start:stop` of it, into a new array.

        Args:
          name: name of the tensor.
          start: first row.
          stop: end of the rows; None: the whole tensor.

        Raises:
          UserError: the file is too short.
        """
        info = self.tensors[name]
        if info.file not in self._files:
            self._files[info.file] = os.open(info.file, os.O_RDONLY)
        shape, offset = info.shape, info.offset
        if stop is not None:
            offset += start * (info.nbytes // shape[0])
            shape = (stop - start, *shape[1:])
        array = np.empty(shape, NUMPY_DTYPES[info.dtype])
        view = array.reshape(-1).view(np.uint8).data
        while view:
            count = os.preadv(self._files[info.file], [view], offset)
            if count == 0:
                raise UserError(
                    f"{info.file}: ends inside {name}; the file has changed since it was scanned"
                )
            view, offset = view[count:], offset + count
        return array


def scan(directory: Path) -> tuple[Source, list[str]]:
    """Finds all tensors of an original checkpoint without reading their data.

    Args:
      directory: the checkpoint.

    Returns:
      The tensors of all readable files, and all problems of the index, files and headers.
    """
    problems: list[str] = []
    if (directory / INDEX_FILE).exists():
        index = _read_index(directory / INDEX_FILE, problems)
        return _scan_shards(directory, index, problems), problems
    file = _single_file(directory, problems)
    held = None
    if file is not None and (instead := _not_downloaded(directory / file)) is not None:
        problems.append(f"{file}: {instead}")
    elif file is not None:
        held = _read_header(directory / file, problems)
    return Source(held or {}, None if held is None else frozenset()), problems


def _scan_shards(directory: Path, index: dict[str, str], problems: list[str]) -> Source:
    """Reads the headers of all shards, and compares them with the index."""
    tensors: dict[str, TensorInfo] = {}
    unreadable: set[str] = set()
    names_in: dict[str, set[str]] = {}
    for name, file in index.items():
        names_in.setdefault(file, set()).add(name)
    placeholders: dict[str, list[str]] = {}
    for file, indexed in sorted(names_in.items()):
        held = None
        if not (directory / file).is_file():
            problems.append(
                f"{INDEX_FILE} names {clip(file, 120)} for {len(indexed)} tensors; no such file"
            )
        elif (instead := _not_downloaded(directory / file)) is not None:
            placeholders.setdefault(instead, []).append(file)
        else:
            held = _read_header(directory / file, problems)
        if held is None:
            unreadable |= indexed
            continue
        absent = sorted(indexed - held.keys())
        unlisted = sorted(held.keys() - indexed)
        if absent:
            problems.append(f"{clip(file, 120)} does not hold, as the index says: {some(absent)}")
            unreadable |= set(absent)
        if unlisted:
            problems.append(f"{clip(file, 120)} holds, against the index: {some(unlisted)}")
        tensors |= {name: held[name] for name in indexed & held.keys()}
    for instead, files in placeholders.items():
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        problems.append(f"{clip(files[0], 120)}{more}: {instead}")
    return Source(tensors, unreadable if index else None)


def _not_downloaded(path: Path) -> str | None:
    with path.open("rb") as file:
        return not_downloaded(file.read(HEAD))


def some(names: list[str], limit: int = 10) -> str:
    """Formats a list of names; shows at most `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(clip(name, 120) for name in names[:limit]) + more


def _read_index(path: Path, problems: list[str]) -> dict[str, str]:
    """Reads the index {tensor: shard}; {} if there is a problem."""
    try:
        weight_map = read_object(path, _MAX_INDEX).get("weight_map")
    except UserError as error:
        problems.append(str(error).removeprefix(f"{path.parent}{os.sep}"))
        return {}
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{path.name}: its weight_map must name tensors, got {shown(weight_map)}")
        return {}
    for name, file in weight_map.items():
        if not _is_file_name(file):
            what = f"weight_map[{shown(name)}] is {shown(file)}, expected the name of a file"
            problems.append(f"{path.name}: {what}")
            return {}
    return weight_map


def _is_file_name(value: Any) -> bool:
    """Whether a value can be the name of a file beside the index."""
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and Path(value).name == value
        and "\0" not in value
        and len(value.encode()) <= 255
    )


def _single_file(directory: Path, problems: list[str]) -> str | None:
    """The safetensors file of a checkpoint without an index; None if there is a problem."""
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if SINGLE_FILE in files:
        return SINGLE_FILE
    if "adapter_model.safetensors" in files:
        problems.append(
            "adapter_model.safetensors is a PEFT adapter, not a model; merge it into the model that"
            " it was trained on (merge_and_unload), save that, and convert it"
        )
        return None
    if len(files) == 1:
        return files[0]
    if files:
        problems.append(f"{len(files)} safetensors files, but no {INDEX_FILE} that names them")
    elif any(directory.glob("pytorch_model*.bin")) or any(directory.glob("*.gguf")):
        what = "pytorch_model*.bin and GGUF are not supported; get the safetensors files instead"
        problems.append(what)
    else:
        problems.append(f"neither {SINGLE_FILE} nor {INDEX_FILE}: no weights here")
    return None


def _read_header(path: Path, problems: list[str]) -> dict[str, TensorInfo] | None:
    """Reads the header of a safetensors file; None if the whole file is unusable."""
    size, file_name = path.stat().st_size, clip(path.name, 120)
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            problems.append(
                f"{file_name}: not a whole safetensors file (a header of {length} bytes in a file"
                f" of {size}); download it again"
            )
            return None
        raw = file.read(length)
    try:
        header = parse_object(raw)
        header.pop("__metadata__", None)
        spans = {name: _span(name, entry) for name, entry in header.items()}
    except ValueError as error:
        problems.append(f"{file_name}: bad safetensors header ({error})")
        return None
    data, end = 8 + length, 0
    for _, _, begin, stop in sorted(spans.values(), key=lambda span: span[2:]):
        if begin != end:
            problems.append(f"{file_name}: its tensors overlap or leave gaps; download it again")
            return None
        end = stop
    if data + end != size:
        what = "truncated" if data + end > size else "longer than it should be"
        problems.append(
            f"{file_name}: {what}: its header tells of {data + end} bytes, the file has {size};"
            " download it again"
        )
        return None
    return {
        name: TensorInfo(name, path, dtype, shape, data + begin)
        for name, (dtype, shape, begin, _) in spans.items()
    }


def _span(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Parses an entry of a header: dtype, shape, and begin and end of its data in bytes."""

    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{clip(name, 120)}: dtype {shown(dtype)}, expected F32, F16 or BF16")
    axes, span = _numbers(shape, _MAX_AXES), _numbers(offsets, 2)
    if axes is None or span is None or len(span) != 2:
        what = f"shape {shown(shape)}, data_offsets {shown(offsets)}"
        raise ValueError(f"{clip(name, 120)}: {what}, expected lists of whole numbers")
    begin, stop = span
    if stop - begin != _nbytes(dtype, axes):
        raise ValueError(f"{clip(name, 120)}: {stop - begin} bytes for {dtype}{list(axes)}")
    return dtype, axes, begin, stop


def _numbers(value: Any, most: int) -> tuple[int, ...] | None:
    """Reads a list of at most `most` sizes or offsets; None if it is something else."""
    if not isinstance(value, list) or len(value) > most:
        return None
    if not all(type(number) is int and 0 <= number <= _MAX_SIDE for number in value):
        return None
    return tuple(value)
