"""Reads an original checkpoint: finds the tensors in its safetensors files, and reads each by name.

Files are read with `pread`.  The library `safetensors` is not used, because it maps files into
memory: pages that were read would count as memory of the process, and an I/O error or a truncated
file would kill the process without a message (SIGBUS).
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping, Set
from pathlib import Path

import ml_dtypes
import numpy as np

from vl2jax.common.errors import UserError, listed

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
_ITEM_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2}
_ITEM_SIZES |= {"F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
_MAX_HEADER = 100_000_000  # limit of the format, in bytes


class ConversionError(UserError):
    """All problems of a checkpoint.

    Attributes:
      problems: one message for each problem.
    """

    def __init__(self, what: str, problems: list[str]):
        """Makes the error.

        Args:
          what: the checkpoint.
          problems: one message for each problem.
        """
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(f"{what}: {count}\n{listed(problems, len(problems))}")
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
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]


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
    held = _read_header(directory / file, problems) if file else None
    return Source(held or {}, None if held is None else frozenset()), problems


def _scan_shards(directory: Path, index: dict[str, str], problems: list[str]) -> Source:
    """Reads the headers of all shards, and compares them with the index."""
    tensors: dict[str, TensorInfo] = {}
    unreadable: set[str] = set()
    for file in sorted(set(index.values())):
        listed = {name for name, shard in index.items() if shard == file}
        held = None
        if not (directory / file).is_file():
            problems.append(f"{INDEX_FILE} names {file} for {len(listed)} tensors; no such file")
        else:
            held = _read_header(directory / file, problems)
        if held is None:
            unreadable |= listed
            continue
        absent = sorted(listed - held.keys())
        unlisted = sorted(held.keys() - listed)
        if absent:
            problems.append(f"{file} does not hold, as the index says: {some(absent)}")
            unreadable |= set(absent)
        if unlisted:
            problems.append(f"{file} holds, against the index: {some(unlisted)}")
        tensors |= {name: held[name] for name in listed & held.keys()}
    return Source(tensors, unreadable if index else None)


def some(names: list[str], limit: int = 10) -> str:
    """Formats a list of names; shows at most `limit` of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read_index(path: Path, problems: list[str]) -> dict[str, str]:
    """Reads the index {tensor: shard}; {} if there is a problem."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{path.name}: not an index with a weight_map ({_reason(error)})")
        return {}
    bad = [k for k, v in items if not isinstance(v, str) or Path(v).name != v or not v]
    if bad or not items:
        what = f"weight_map[{bad[0]!r}] is not a file name" if bad else "the weight_map is empty"
        problems.append(f"{path.name}: {what}")
        return {}
    return dict(items)


def _single_file(directory: Path, problems: list[str]) -> str | None:
    """The safetensors file of a checkpoint without an index; None if there is a problem."""
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if SINGLE_FILE in files:
        return SINGLE_FILE
    if len(files) == 1:
        return files[0]
    if files:
        problems.append(f"{len(files)} safetensors files, but no {INDEX_FILE} that names them")
    elif any(directory.glob("pytorch_model*.bin")):
        problems.append("pytorch_model*.bin is not supported; get the safetensors files instead")
    else:
        problems.append(f"neither {SINGLE_FILE} nor {INDEX_FILE}: no weights here")
    return None


def _read_header(path: Path, problems: list[str]) -> dict[str, TensorInfo] | None:
    """Reads the header of a safetensors file; None if the whole file is unusable."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            problems.append(
                f"{path.name}: not a whole safetensors file (a header of {length} bytes in a file"
                f" of {size})"
            )
            return None
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("not a mapping")
        header.pop("__metadata__", None)
        spans = {name: _span(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"{path.name}: bad safetensors header ({_reason(error)})")
        return None
    data = 8 + length
    end = data + max((stop for *_, stop in spans.values()), default=0)
    if end > size:
        problems.append(
            f"{path.name}: truncated: its header tells of {end} bytes, the file has {size};"
            " download it again"
        )
        return None
    if end < size or sum(stop - begin for *_, begin, stop in spans.values()) != end - data:
        problems.append(f"{path.name}: its tensors overlap or leave gaps; download it again")
        return None
    return {
        name: TensorInfo(name, path, dtype, shape, data + begin)
        for name, (dtype, shape, begin, _) in spans.items()
    }


def _span(entry: Mapping) -> tuple[str, tuple[int, ...], int, int]:
    """Parses an entry of a header: dtype, shape, and begin and end of its data in bytes."""
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, stop = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)):
        raise ValueError(f"shape {entry['shape']}, data_offsets {entry['data_offsets']}")
    if dtype not in _ITEM_SIZES:
        raise ValueError(f"dtype {dtype!r}")
    if stop - begin != math.prod(shape) * _ITEM_SIZES[dtype]:
        raise ValueError(f"{stop - begin} bytes for {dtype}{list(shape)}")
    return dtype, shape, begin, stop


def _reason(error: Exception) -> str:
    """Describes a parsing error in one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
