"""Saves and restores trees of arrays with Orbax."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vl2jax.checkpoints.array_writer import tree_handler
from vl2jax.checkpoints.completeness import DATA, OPT_STATE, PARAMS, seal
from vl2jax.checkpoints.model_dir import flatten, read_leaf
from vl2jax.checkpoints.param_store import ParamStore
from vl2jax.checkpoints.plain_names import plain_name
from vl2jax.common.errors import storage_failure

_CHUNK_BYTES = 64 * 2**20  # maximum size of a chunk; smaller shards are stored as one chunk
_SPLIT_ABOVE = 8 * 2**20  # larger stacks are stored with one layer, or one expert, per chunk
_ORBAX = f"{os.sep}orbax{os.sep}"  # occurs in the paths of Orbax's source files
TEMPORARY = ".orbax-checkpoint-tmp"  # occurs in the names of incomplete checkpoints
_MAX_CLOSE_ATTEMPTS = 8  # more than the threads of a save, each of which can fail once


def open_manager(directory: Path, keep: int, keep_every: int | None):
    """Opens an Orbax `CheckpointManager`; `seal` marks its checkpoints before they get their names.

    Args:
      directory: directory of the checkpoints.
      keep: number of newest checkpoints to keep.
      keep_every: steps that are multiples of it are also kept; None: no others.
    """
    import orbax.checkpoint as ocp

    silence_orbax()
    managers = ocp.checkpoint_managers
    rules = [managers.LatestN(keep)]
    rules += [] if keep_every is None else [managers.EveryNSteps(keep_every)]

    def mark() -> None:
        if jax.process_index() == 0:
            for unfinished in directory.glob(f"*{TEMPORARY}*"):
                seal(unfinished)

    options = ocp.CheckpointManagerOptions(
        async_options=ocp.AsyncOptions(post_finalization_callback=mark),
        preservation_policy=managers.AnyPreservationPolicy(rules),
        save_root_metadata=False,
        lightweight_initialize=True,  # tolerates a checkpoint that was deleted only in part
    )
    handlers = {
        PARAMS: tree_handler(ocp),
        OPT_STATE: tree_handler(ocp),
        DATA: ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(plain_name(directory), options=options, item_handlers=handlers)


def close_manager(manager) -> None:
    """Waits for all threads of a manager and closes it, even if some of them failed.

    Each thread of a save can fail on its own, and `close` raises one failure per call.  The caller
    has already reported the first one; the others have the same cause and are ignored.
    """
    for _ in range(_MAX_CLOSE_ATTEMPTS):
        try:
            manager.close()
        except (OSError, ValueError):
            continue
        return


def silence_orbax() -> None:
    """Suppresses the logs of Orbax; vl2jax itself reports what a user needs to know."""
    from absl import logging as absl_logging

    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        if _is_not_orbax not in logger.filters:
            logger.addFilter(_is_not_orbax)


class _UnraisableHook:
    """Suppresses the late exceptions that pending writes of a failed save raise."""

    def __init__(self, hook: Callable[[Any], None]):
        self._hook = hook

    def __call__(self, unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # only coroutines have it
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not (late or (code is not None and _ORBAX in code.co_filename)):
            self._hook(unraisable)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Log filter: False if the record, or the exception that it logs, comes from Orbax."""
    files = [record.pathname]
    if record.exc_info and record.exc_info[2]:
        frames = traceback.walk_tb(record.exc_info[2])
        files += [frame.f_code.co_filename for frame, _ in frames]
    return not any(_ORBAX in file for file in files)


def save_args(ocp, tree: Any):
    """Arguments that save a tree as nested dicts, so that each array is stored under its path.

    Args:
      ocp: the module `orbax.checkpoint`, which is slow to import.
      tree: arrays.

    Returns:
      `ocp.args.PyTreeSave`, with chunks of at most 64 MiB; see `_split_axes`.
    """
    item: dict[str, Any] = {}
    args: dict[str, Any] = {}
    for path, leaf in flatten(tree).items():
        *parents, last = path.split("/")
        node, arg = item, args
        for parent in parents:
            node, arg = node.setdefault(parent, {}), arg.setdefault(parent, {})
        node[last] = leaf
        arg[last] = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=_split_axes(path, leaf))
    return ocp.args.PyTreeSave(item, save_args=args)


def _split_axes(path: str, leaf) -> tuple[int, ...]:
    """Axes along which a large stack is split into chunks, because export reads it in slices."""
    if leaf.nbytes <= _SPLIT_ABOVE:
        return ()
    if re.search(r"/mlp/experts/", path):
        return (0, 1)
    return (0,) if re.search(r"/((dense|moe)_\d+|vision/blocks)/", path) else ()


def read_tree(store: ParamStore, like: Any) -> Any:
    """Reads arrays one by one.

    Args:
      store: stored arrays.
      like: tree of arrays or `jax.ShapeDtypeStruct`: the structure and shardings of the result.

    Returns:
      A tree like `like`, with arrays in their stored dtype.
    """
    leaves = []
    for path, wanted in flatten(like).items():
        leaves.append(read_leaf(store.open(path), sharding=getattr(wanted, "sharding", None)))
        jax.block_until_ready(leaves[-1])
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def reason(error: Exception) -> str:
    """Returns the reason why a save failed, as a short phrase."""
    text = str(error)
    if (failure := storage_failure(error)) is not None:
        return failure
    if "RESOURCE_EXHAUSTED" in text:
        return "the disk is full or a quota is used up"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore's messages: where, then what, then its own source lines in brackets.
    what = text.split(" [")[0].split("\n")[0].rsplit(": ", 1)[-1]
    return what[:300] or type(error).__name__
