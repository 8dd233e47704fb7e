"""Reads stored parameters chunk by chunk.

Orbax writes `params/`.  It is read with TensorStore, so that only the requested array and a few
chunks are in memory at a time.
"""

import collections
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vl2jax.checkpoints.plain_names import plain_name
from vl2jax.common.errors import UserError, listed
from vl2jax.common.paths import AnyPath, is_remote

_IN_FLIGHT = 128 * 2**20  # bytes that are read concurrently

# How TensorStore's messages begin if the storage does not answer; the data may be whole.
_NO_ANSWER = ("UNKNOWN", "UNAVAILABLE", "DEADLINE", "ABORTED", "CANCELLED", "PERMISSION")

# Chunks that lie side by side in an object are one request.
_COALESCED = {
    "experimental_read_coalescing_threshold_bytes": 2**20,
    "experimental_read_coalescing_merged_bytes": 2**26,
    "experimental_read_coalescing_interval": "1ms",
}

Shape = tuple[int, ...]


class CheckpointError(UserError):
    """A directory is not a usable model; the message names it, the problem and the fix."""


class DamageError(CheckpointError):
    """Stored data cannot be read, is missing or has another checksum."""


class ParamStore:
    """The stored parameters of a model, by path; each is opened separately.

    Paths are "params/decoder/..." and "router/...".  The format is the default of Orbax: all arrays
    in one OCDBT store, each under its path joined with dots.
    """

    def __init__(self, directory: AnyPath):
        import tensorstore as ts  # slow to import

        self._directory = directory
        self._kvstore: dict[str, Any] = {"driver": "ocdbt", "base": kvstore_spec(directory)}
        if is_remote(directory):
            self._kvstore |= _COALESCED
        kvstore = self._kvstore
        try:
            keys = ts.KvStore.open(kvstore).result().list().result()
        except ValueError as error:
            raise _unreadable(f"{directory} cannot be read", error) from error
        markers = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
        self._drivers = {
            key.decode().removesuffix(marker).replace(".", "/"): driver
            for key in keys
            for marker, driver in markers.items()
            if key.decode().endswith(marker)
        }
        if not self._drivers:
            raise DamageError(f"{directory} holds no parameters; convert the model again")

    @property
    def paths(self) -> list[str]:
        """Paths of all stored parameters, sorted."""
        return sorted(self._drivers)

    def open(self, path: str):
        """Opens one parameter for reading.

        Returns:
          A `tensorstore.TensorStore`.

        Raises:
          CheckpointError: the parameter cannot be read.
        """
        import tensorstore as ts

        name = path.replace("/", ".") + "/"
        kvstore = self._kvstore | {"path": name}
        spec = {"driver": self._drivers[path], "kvstore": kvstore}
        spec["fill_missing_data_reads"] = False  # a missing chunk is an error, not zeros
        try:
            return ts.open(spec, read=True, open=True).result()
        except ValueError as error:
            raise _unreadable(f"parameter {path} cannot be read", error) from error

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Checks that paths and shapes are those of a model.

        Args:
          expected: shape by path.

        Raises:
          CheckpointError: a parameter is missing, unexpected or of another shape; one error lists
            all of them.
        """
        problems = self.differences({path: (shape, None) for path, shape in expected.items()})
        if problems:
            raise CheckpointError(
                f"the parameters in {self._directory} do not match the model:\n{listed(problems)}"
            )

    def differences(self, expected: Mapping[str, tuple[Shape, np.dtype | None]]) -> list[str]:
        """Compares the stored parameters with the expected ones.

        Args:
          expected: shape and dtype by path; a dtype of None matches any.

        Returns:
          One line for each parameter that is missing, unexpected or of another shape or dtype.
        """
        problems = [
            f"missing: {path} {_described(*wanted)}"
            for path, wanted in expected.items()
            if path not in self._drivers
        ]
        problems += [f"unexpected: {path}" for path in self.paths if path not in expected]
        for path, (shape, dtype) in expected.items():
            if path in self._drivers:
                stored = self.open(path)
                found = _described(
                    stored.shape, None if dtype is None else stored.dtype.numpy_dtype
                )
                if found != (wanted := _described(shape, dtype)):
                    problems.append(f"{path} is {found}, expected {wanted}")
        return problems


def kvstore_spec(directory: AnyPath) -> dict[str, Any]:
    """Describes a directory as a key-value store of TensorStore.

    AWS_ENDPOINT_URL names another server of S3, as for other programs.
    """
    if not is_remote(directory):
        return {"driver": "file", "path": f"{plain_name(Path(directory))}/"}
    scheme, _, rest = str(directory).partition("://")
    bucket, _, path = rest.partition("/")
    driver = {"gs": "gcs", "s3": "s3"}[scheme]
    spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{path}/"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return spec


def read_array(store, index: tuple[slice, ...] | None = None, dtype=None) -> np.ndarray:
    """Reads a parameter, or a slice of it, chunk by chunk.

    Args:
      store: the parameter, from `ParamStore.open`.
      index: one slice per axis; None: the whole parameter.
      dtype: dtype to cast to; None: the stored dtype.

    Returns:
      An array, aligned so that JAX on the CPU can use it without a copy.

    Raises:
      CheckpointError: the stored data is damaged.
    """
    return read_parts(store, [index or (slice(None),) * len(store.shape)], dtype)[0]


def read_parts(store, parts: Sequence[tuple[slice, ...]], dtype=None) -> list[np.ndarray]:
    """Reads slices of a parameter; a chunk that several of them share is read once.

    Args:
      store: the parameter, from `ParamStore.open`.
      parts: the slices, each one slice per axis.
      dtype: dtype to cast to; None: the stored dtype.

    Returns:
      An array for each slice, as `read_array` returns it.

    Raises:
      CheckpointError: the stored data is damaged.
    """
    boxes = [
        [part.indices(size)[:2] for part, size in zip(index, store.shape, strict=True)]
        for index in parts
    ]
    dtype = np.dtype(dtype or store.dtype.numpy_dtype)
    outs = [aligned_empty(tuple(high - low for low, high in box), dtype) for box in boxes]
    waiting: collections.deque = collections.deque()
    in_flight = 0
    for cells in _by_chunk(boxes, store.chunk_layout.read_chunk.shape or ()):  # None for a scalar
        if in_flight > _IN_FLIGHT:
            in_flight -= _take(*waiting.popleft())
        axes = zip(*(cell for _, cell in cells), strict=True)
        span = [(min(low for low, _ in axis), max(high for _, high in axis)) for axis in axes]
        targets = [
            (outs[number][_within(cell, boxes[number])], _within(cell, span))
            for number, cell in cells
        ]
        waiting.append((store[tuple(slice(*bounds) for bounds in span)].read(), targets))
        in_flight += math.prod(high - low for low, high in span) * store.dtype.numpy_dtype.itemsize
    while waiting:
        _take(*waiting.popleft())
    return outs


Box = Sequence[tuple[int, int]]  # first index and last index + 1 along each axis


def _by_chunk(boxes: Sequence[Box], chunk: Shape) -> list[list[tuple[int, Box]]]:
    """Groups what boxes need by chunk: the number of a box, and its part in the chunk."""
    groups: dict[tuple, list[tuple[int, Box]]] = {}
    for number, box in enumerate(boxes):
        for cell in _cells(box, chunk):
            place = tuple(low // size for (low, _), size in zip(cell, chunk, strict=True))
            groups.setdefault(place, []).append((number, cell))
    return list(groups.values())


def _within(inner: Box, outer: Box) -> tuple:
    """Slices that take the inner box out of an array of the outer one; a view, also of scalars."""
    return (
        *(slice(a - low, b - low) for (a, b), (low, _) in zip(inner, outer, strict=True)),
        ...,
    )


def _take(waiting, targets: Sequence[tuple[np.ndarray, tuple]]) -> int:
    """Waits for a read, copies its parts to their targets and returns its bytes."""
    try:
        value = waiting.result()
    except ValueError as error:
        raise _unreadable("stored data is damaged", error) from error
    for target, place in targets:
        target[...] = value[place]
    return value.nbytes


def _cells(bounds: Box, chunk: Sequence[int]) -> Iterator[tuple]:
    """Splits a box at the chunk boundaries, so that each chunk is read once."""
    axes = []
    for (low, high), size in zip(bounds, chunk, strict=True):
        cuts = range((low // size + 1) * size, high, size)
        axes.append(list(itertools.pairwise([low, *cuts, high])) if high > low else [])
    yield from itertools.product(*axes)


def aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array that is aligned to 64 bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _described(shape: Sequence[int], dtype: np.dtype | None) -> str:
    """Formats shape and dtype as `float32[2, 3]`; without a dtype as `[2, 3]`."""
    return f"{'' if dtype is None else np.dtype(dtype).name}{[*map(int, shape)]}"


def _unreadable(what: str, error: Exception) -> CheckpointError:
    """The error for what cannot be read; not `DamageError` if the storage did not answer."""
    text = _short(error)
    if text.startswith(_NO_ANSWER):
        return CheckpointError(f"the storage cannot be read now: {text}; try again")
    return DamageError(f"{what}: {text}")


def _short(error: Exception) -> str:
    """The message of a TensorStore error without the library's source lines."""
    return str(error).split(" [")[0][:300]
