"""Trees of arrays in and out of Orbax checkpoints."""

import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vl2jax.checkpoints.model_dir import flatten, read_leaf
from vl2jax.checkpoints.store import ParamStore
from vl2jax.common.errors import is_disk_full

_CHUNK_BYTES = 64 * 2**20  # on the disk, at most; smaller arrays are one chunk per shard
_SPLIT_ABOVE = 8 * 2**20  # larger stacks are stored one layer, or one expert, per chunk
_ORBAX = f"{os.sep}orbax{os.sep}"  # in the names of its source files
_PARTS_OF_A_SAVE = 8  # more than there are


def open_manager(directory: Path, keep: int, keep_every: int | None):
    """The Orbax manager of a directory of checkpoints."""
    import orbax.checkpoint as ocp

    silence_orbax()
    managers = ocp.checkpoint_managers
    rules = [managers.LatestN(keep)]
    rules += [] if keep_every is None else [managers.EveryNSteps(keep_every)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(rules),
        save_root_metadata=False,
        lightweight_initialize=True,  # a checkpoint whose deletion was cut short is no obstacle
    )
    return ocp.CheckpointManager(directory, options=options)


def close_manager(manager) -> None:
    """Closes a manager when all its threads have ended, whatever they failed of.

    Each part of a save can fail by itself, and each failure comes up once, where it is waited for;
    the first is known to the caller, the others say the same.
    """
    for _ in range(_PARTS_OF_A_SAVE):
        try:
            manager.close()
        except (OSError, ValueError):
            continue
        return


def silence_orbax() -> None:
    """Drops Orbax's log: what a user must know is told here, once."""
    from absl import logging as absl_logging

    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        if _is_not_orbax not in logger.filters:
            logger.addFilter(_is_not_orbax)


class _UnraisableHook:
    """Leaves out what the writes of a failed save complain of when they end after it."""

    def __init__(self, hook: Callable[[Any], None]):
        self._hook = hook

    def __call__(self, unraisable) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        late = str(unraisable.exc_value) == "Event loop is closed"
        if not (late or (code is not None and _ORBAX in code.co_filename)):
            self._hook(unraisable)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record neither comes from Orbax nor shows an error inside it."""
    files = [record.pathname]
    if record.exc_info and record.exc_info[2]:
        frames = traceback.walk_tb(record.exc_info[2])
        files += [frame.f_code.co_filename for frame, _ in frames]
    return not any(_ORBAX in file for file in files)


def save_args(ocp, tree: Any):
    """What Orbax is to save: the leaves as nested dicts, so that a store names them by path."""
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
    """Axes along which a large stack is stored slice by slice, as export reads it."""
    if leaf.nbytes <= _SPLIT_ABOVE:
        return ()
    if re.search(r"/mlp/experts/", path):
        return (0, 1)
    return (0,) if re.search(r"/((dense|moe)_\d+|vision/blocks)/", path) else ()


def read_tree(store: ParamStore, like: Any) -> Any:
    """Reads arrays into the structure and onto the shardings of `like`."""
    leaves = []
    for path, wanted in flatten(like).items():
        leaves.append(read_leaf(store.open(path), sharding=getattr(wanted, "sharding", None)))
        jax.block_until_ready(leaves[-1])
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def reason(error: Exception) -> str:
    """Why a save failed, in a few words."""
    text = str(error)
    if is_disk_full(error):
        return "the disk is full"
    if "RESOURCE_EXHAUSTED" in text:
        return "the disk is full or a quota is used up"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore says where, then what, then its own source lines in brackets.
    what = text.split(" [")[0].split("\n")[0].rsplit(": ", 1)[-1]
    return what[:300] or type(error).__name__
