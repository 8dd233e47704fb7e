"""The training workdir: checkpoints that survive anything, beside the files that make it a model.

config.json, model.json, tokenizer.json ...     see `lineage.prepare`
checkpoints/STEP/params, opt_state, data        one saved step; it gets its name only when whole

`params` is stored as in a model directory, so every program that takes one takes a workdir.
"""

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vl2jax.checkpoints import model_dir as checkpoint
from vl2jax.checkpoints.model_dir import CHECKPOINTS, complete_steps, flatten
from vl2jax.checkpoints.orbax_io import (
    close_manager,
    open_manager,
    read_tree,
    reason,
    save_args,
)
from vl2jax.checkpoints.store import CheckpointError, ParamStore
from vl2jax.common.errors import UserError, listed
from vl2jax.common.file_lock import lock_directory

OPT_STATE, DATA = "opt_state", "data"
_TORN = ".orbax-checkpoint-tmp"  # in the name of what is being written, or was when it ended
_REMOVALS, _LATE = 100, 0.05  # times that torn checkpoints are removed, seconds between them


class Workdir:
    """Saves and restores the state of a training run; close it at the end.

    All processes of a run open one together, and call `save` and `restore` together.

    Attributes:
      path: the directory.
      on_error: told, in one line, of a save that failed; may be replaced.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        keep: int,
        keep_every: int | None,
        on_error: Callable[[str], None] | None = None,
    ):
        """Opens a workdir, makes it if need be, and removes what a killed run left half written.

        Args:
          path: the directory.
          keep: how many of the newest checkpoints stay.
          keep_every: steps that are multiples of it stay for ever; None: no such steps.
          on_error: told, in one line, that a save failed; None: a line on standard error.

        Raises:
          UserError: impossible keep rules, or another run is at work there.
          OSError: it cannot be made or read.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise UserError(
                f"keep and keep_every must be at least 1, got {keep} and {keep_every}"
                " (keep_every None keeps no old steps)"
            )
        self.path = Path(path).expanduser().resolve()
        self.on_error = on_error or _warn
        self._pending: int | None = None  # the step being saved
        self._checkpoints = self.path / CHECKPOINTS
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                _lock(self._checkpoints, stack)
            self._remove_torn()
            self._open = functools.partial(open_manager, self._checkpoints, keep, keep_every)
            self._manager = self._open()
            self._resources = stack.pop_all()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest complete step; None if there is none."""
        return max(complete_steps(self.path), default=None)

    def save(
        self,
        step: int,
        *,
        params: Any,
        opt_state: Any,
        data_state: Mapping[str, Any],
        wait: bool = False,
    ) -> None:
        """Saves one step while training goes on; the arrays may be donated once this returns.

        It first waits for the save before it.  A step that is complete already is left as it is.
        A save that fails is told to `on_error`, here or by a later call, and changes nothing else.

        Args:
          step: number of optimizer steps done.
          params: {"params": {...}, "router": {...}} of arrays.
          opt_state: any tree of arrays, with at least one.
          data_state: where the data iterator stands, as JSON.
          wait: return only when it is on the disk.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if step in complete_steps(self.path):
            return
        self._remove_torn()
        items = {
            checkpoint.PARAMS: save_args(ocp, params),
            OPT_STATE: save_args(ocp, opt_state),
            DATA: ocp.args.JsonSave(dict(data_state)),
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except (OSError, ValueError) as error:
            self._failed(step, error)
            return
        self._pending = step
        if wait:
            self.wait()

    def poll(self) -> None:
        """Looks, without waiting, whether a save has ended, so that a failure is told soon."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on the disk, or has failed and been told."""
        step, self._pending = self._pending, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._failed(step, error)

    def close(self) -> None:
        """Waits for the last save and lets the directory go."""
        self.wait()
        close_manager(self._manager)
        self._remove_torn()
        self._resources.close()

    def restore(
        self, step: int | None = None, *, like_params: Any, like_opt_state: Any
    ) -> tuple[int, Any, Any, dict[str, Any]]:
        """Reads a saved step, array by array, each device its own part.

        Args:
          step: which; None: the newest complete one.
          like_params, like_opt_state: trees of `jax.ShapeDtypeStruct` with shardings (None: the
            default device), as the run has them now.

        Returns:
          (step, params, opt_state, data_state).

        Raises:
          CheckpointError: no such step, or arrays that differ in name, shape or dtype; all
            differences are in one message.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = self._existing(step)
        parts = {checkpoint.PARAMS: like_params, OPT_STATE: like_opt_state}
        stores = {name: ParamStore(self._checkpoints / str(step) / name) for name in parts}
        problems = [
            f"{name}: {problem}"
            for name, like in parts.items()
            for problem in stores[name].differences(
                {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(like).items()}
            )
        ]
        if problems:
            raise CheckpointError(
                f"checkpoint {self._checkpoints / str(step)} does not fit this run; was its"
                " configuration changed? Change it back, or begin in a new workdir with"
                " init_from:\n" + listed(problems)
            )
        params, opt_state = (read_tree(stores[name], like) for name, like in parts.items())
        found = self._manager.restore(
            step, args=ocp.args.Composite(**{DATA: ocp.args.JsonRestore()})
        )
        return step, params, opt_state, found[DATA]

    def _existing(self, step: int | None) -> int:
        steps = complete_steps(self.path)
        if not steps:
            raise CheckpointError(f"{self.path} has no complete checkpoint yet")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.path} has no step {step}; it has {_some(steps)}")
        return steps[-1] if step is None else step

    def _failed(self, step: int, error: Exception) -> None:
        """Cleans up after a failed save and tells of it."""
        close_manager(self._manager)  # parts of the save may still be at work
        self._remove_torn()
        self._manager = self._open()
        steps = complete_steps(self.path)
        if step in steps:
            message = f"checkpoint {step} is saved, but older ones could not be removed"
            self.on_error(f"{message}: {reason(error)}")
            return
        newest = f"the newest is of step {steps[-1]}" if steps else "there is none yet"
        self.on_error(
            f"checkpoint {step} could not be saved in {self._checkpoints}: {reason(error)};"
            f" {newest}, and the next save is tried as usual"
        )

    def _remove_torn(self) -> None:
        """Removes half-written checkpoints; none of ours is being saved when this is called.

        The storage library may still put down files of a save that has failed, which makes a
        directory again, or one that is not empty; so this goes on until none is left.
        """
        if jax.process_index() != 0:
            return
        for _ in range(_REMOVALS):
            torn = [entry for entry in self._checkpoints.iterdir() if _TORN in entry.name]
            if not torn:
                return
            for entry in torn:
                shutil.rmtree(entry, ignore_errors=True)
            time.sleep(_LATE)


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    """Takes the workdir for this process."""
    try:
        lock_directory(directory, stack)
    except BlockingIOError as error:
        raise UserError(
            f"another run is training in {directory.parent}; wait for its end or choose another"
            " workdir"
        ) from error
    except OSError:
        return  # this file system has no locks


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[-8:]))
