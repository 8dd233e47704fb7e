"""Writes safetensors files piece by piece, sharded like the released checkpoints.

The library `safetensors` is not used, because it needs all tensors of a file in memory.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.source import INDEX_FILE, NUMPY_DTYPES, SINGLE_FILE


class TensorSpec(NamedTuple):
    """A tensor to write.

    Attributes:
      name: name of the tensor.
      dtype: its dtype, as safetensors names it.
      shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * NUMPY_DTYPES[self.dtype].itemsize


def plan_shards(
    tensors: Sequence[TensorSpec], shard_size: int
) -> list[tuple[str, list[TensorSpec]]]:
    """Assigns tensors, in order, to files.

    Args:
      tensors: the tensors.
      shard_size: maximum number of bytes of tensors per file; a larger tensor gets its own file.

    Returns:
      (file name, its tensors) of each file.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [(SINGLE_FILE, groups[0])]
    count = len(groups)
    return [(f"model-{i:05}-of-{count:06}.safetensors", g) for i, g in enumerate(groups, 1)]


def header_bytes(tensors: Sequence[TensorSpec]) -> bytes:
    """Returns the header of a safetensors file with these tensors, in this order."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shards(
    directory: Path,
    shards: Sequence[tuple[str, list[TensorSpec]]],
    data: Iterable[np.ndarray],
    on_bytes: Callable[[int], None],
) -> None:
    """Writes safetensors files, and their index if there are several.

    Args:
      directory: an existing directory.
      shards: the files, from `plan_shards`.
      data: values of all tensors in order, in pieces; a piece belongs to one tensor.
      on_bytes: called with the number of bytes of each piece after it is written.
    """
    pieces = iter(data)
    for name, tensors in shards:
        with (directory / name).open("wb") as file:
            file.write(header_bytes(tensors))
            for tensor in tensors:
                for piece in _until(pieces, tensor.nbytes):
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                    on_bytes(piece.nbytes)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        write_index(directory, shards)


def write_index(directory: Path, shards: Sequence[tuple[str, list[TensorSpec]]]) -> None:
    """Writes the index, which maps tensor names to files."""
    total = sum(tensor.nbytes for _, tensors in shards for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in shards for tensor in tensors}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _until(pieces: Iterator[np.ndarray], nbytes: int) -> Iterator[np.ndarray]:
    """Yields pieces until they have `nbytes` in total."""
    while nbytes > 0:
        piece = next(pieces)
        nbytes -= piece.nbytes
        yield piece
