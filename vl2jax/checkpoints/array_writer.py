"""Writes the arrays of an Orbax checkpoint with a checksum in each chunk.

Orbax alone writes no checksums, so a flipped bit would load as another weight.  Here the arrays are
stored in the format zarr3, with the codec crc32c around each compressed chunk.  TensorStore checks
it whenever it reads a chunk, also when only a part of an array is read.  Orbax does the rest:
metadata, threads, merging the parts of all processes, and the atomic rename.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
]


def tree_handler(ocp):
    """Makes an Orbax handler of trees of `jax.Array`, whose chunks have checksums.

    Args:
      ocp: the module `orbax.checkpoint`, which is slow to import.
    """
    return checked_handler(ocp, (jax.Array, _array_handler(ocp)))


def checked_handler(ocp, *handlers):
    """Makes an Orbax handler of trees in the format zarr3.

    Args:
      ocp: the module `orbax.checkpoint`.
      *handlers: pairs of a type of leaves and its handler.
    """
    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)


def write_spec(ocp, info, arg, shape, part: Sequence[int], dtype, process: int) -> dict[str, Any]:
    """Describes how TensorStore writes an array.

    Args:
      ocp: the module `orbax.checkpoint`.
      info, arg: Orbax's description of the leaf, and its arguments.
      shape: shape of the array.
      part: shape of the parts in which it is written; chunks divide it.
      dtype: dtype of the array.
      process: index of the process.
    """
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=True,
        global_shape=shape,
        local_shape=part,
        dtype=dtype,
        process_index=process,
        arg=arg,
    )
    spec["metadata"]["codecs"] = _CODECS
    return spec


def _array_handler(ocp):
    """Makes the handler of one `jax.Array`; a function, because Orbax is imported late."""

    class CheckedArrayHandler(ocp.type_handlers.ArrayHandler):
        """Each process writes the first replica of its shards."""

        async def serialize(self, values, infos, args=None):
            args = args or [None] * len(values)
            for value in values:
                for shard in _own_shards(value):
                    shard.data.copy_to_host_async()
            parts = [[(x.index, _copied(x.data)) for x in _own_shards(one)] for one in values]

            async def write() -> None:
                await asyncio.gather(*map(write_one, values, infos, args, parts))

            async def write_one(value, info, arg, slices) -> None:
                await info.await_path_creation()
                part = value.sharding.shard_shape(value.shape)
                process = jax.process_index()
                spec = write_spec(ocp, info, arg, value.shape, part, value.dtype, process)
                await _write(spec, info.ts_context, slices)

            return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="arrays")]

    return CheckedArrayHandler(enable_write_sharding_file=False)


def _own_shards(value: jax.Array) -> list:
    return [shard for shard in value.addressable_shards if shard.replica_id == 0]


def _copied(data: jax.Array) -> np.ndarray:
    """A copy in the memory of the host, because the array may be donated after a save began."""
    values = np.asarray(data)
    return values if values.flags.owndata else values.copy()


async def _write(spec: dict, context, slices: list) -> None:
    """Writes the parts of an array that this process has."""
    import tensorstore as ts

    store = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
    await asyncio.gather(*(store[index].write(values) for index, values in slices))
