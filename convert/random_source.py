"""Writes random checkpoints in the original layout, for demos, tests and benchmarks."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.mapping import expand
from convert.shards import TensorSpec, header_bytes, plan_shards, write_index, write_shards
from convert.source import NUMPY_DTYPES
from vl2jax.config import VL2Config

_POOL = 2**24  # number of random values, which are reused: drawing 27 billion would take minutes
_PIECE = 2**23  # elements


def write_weights(
    directory: Path,
    config: VL2Config,
    *,
    dtype: str = "BF16",
    shard_size: int = 10**10,
    zeros: bool = False,
    seed: int = 0,
) -> int:
    """Writes `config.json` and the safetensors files of a model.

    Args:
      directory: an existing directory.
      config: architecture.
      dtype: "F32", "BF16" or "F16".
      shard_size: maximum number of bytes per file.
      zeros: whether to write sparse files, which take no disk space and read as zeros.  Otherwise
        values are normal with the config's `initializer_range` as standard deviation and mean 0, or
        mean 1 for norm scales.
      seed: seed of the random values.

    Returns:
      Number of bytes of all tensors.
    """
    tensors = [TensorSpec(entry.hf, dtype, entry.axes.hf_shape) for entry in expand(config)]
    shards = plan_shards(tensors, shard_size)
    if zeros:
        for name, held in shards:
            with (directory / name).open("wb") as file:
                head = header_bytes(held)
                file.write(head)
                file.truncate(len(head) + sum(tensor.nbytes for tensor in held))
        if len(shards) > 1:
            write_index(directory, shards)
    else:
        values = _values(tensors, config.decoder.initializer_range, seed)
        write_shards(directory, shards, values, lambda _: None)
    (directory / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    return sum(tensor.nbytes for tensor in tensors)


def _values(tensors: list[TensorSpec], deviation: float, seed: int) -> Iterator[np.ndarray]:
    """Values of all tensors in pieces, which are slices of one pool of random values."""
    rng = np.random.default_rng(seed)
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    pool = rng.standard_normal(min(_POOL, 2 * max(sizes)), np.float32) * np.float32(deviation)
    for tensor, size in zip(tensors, sizes, strict=True):
        is_scale = len(tensor.shape) == 1 and tensor.name.endswith(".weight")
        while size > 0:
            count = min(size, _PIECE, len(pool) // 2)
            start = rng.integers(len(pool) - count + 1)
            piece = pool[start : start + count] + np.float32(is_scale)
            yield piece.astype(NUMPY_DTYPES[tensor.dtype])
            size -= count
