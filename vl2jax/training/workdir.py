"""The training workdir: checkpoints, next to the files of a model directory.

config.json, model.json, tokenizer.json ...     see `setup.write_workdir`
checkpoints/STEP/params, opt_state, data        one checkpoint, renamed to STEP when complete

`params` is stored as in a model directory, so every program that loads a model directory also loads
a workdir.
"""

import contextlib
import functools
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vl2jax.checkpoints.completeness import (
    CHECKPOINTS,
    DATA,
    NO_MARKER,
    OPT_STATE,
    PARAMS,
    all_steps,
    complete_steps,
    defect,
    describe_defects,
    entries,
    newest_complete,
    read_data_state,
)
from vl2jax.checkpoints.model_dir import flatten
from vl2jax.checkpoints.orbax_io import (
    TEMPORARY,
    close_manager,
    open_manager,
    read_tree,
    reason,
    save_args,
)
from vl2jax.checkpoints.param_store import CheckpointError, DamageError, ParamStore
from vl2jax.common.errors import UserError, listed
from vl2jax.common.file_lock import lock_directory
from vl2jax.common.paths import AnyPath, is_remote, local_path
from vl2jax.parallel.processes import broadcast_from_process_0, gather_to_process_0

PARTS = PARAMS, OPT_STATE, DATA  # of a checkpoint
_ASIDE = ".incomplete"  # ends the names of checkpoints that were complete once, or seemed so
_REMOVALS, _REMOVAL_SECONDS = 100, 0.05  # maximum number of removals, seconds between them


class Workdir:
    """Saves and restores the state of a training run; a context manager.

    All processes of a run must open it together and call `save` and `restore` together.

    Attributes:
      path: the directory.
      home: where complete checkpoints are.
      on_error: called with a one-line message when a save fails; may be replaced.
      on_saved: called with the step when a checkpoint is on disk; None: nothing is called.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        keep: int,
        keep_every: int | None,
        on_error: Callable[[str], None] | None = None,
        home: AnyPath | None = None,
    ):
        """Opens a workdir, creates it if necessary, and removes incomplete checkpoints.

        Args:
          path: the directory.
          keep: number of newest checkpoints to keep.
          keep_every: checkpoints at multiples of this step are never deleted; None: no others.
          on_error: called with a one-line message when a save fails; None: prints to standard
            error.
          home: where complete checkpoints are; None: in `path`.

        Raises:
          UserError: `keep` or `keep_every` is out of range, another run uses the workdir, or it has
            checkpoints, but none is complete.
          OSError: the directory cannot be created or read.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise UserError(
                f"keep and keep_every must be at least 1, got {keep} and {keep_every}"
                " (keep_every may be None: no old steps are kept)"
            )
        self.path = local_path(path, "workdir").resolve()
        self.home: AnyPath = home or self.path
        self.on_error = on_error or _warn
        self.on_saved: Callable[[int], None] | None = None
        self._pending: int | None = None  # the step that is being saved
        self._checkpoints = self.path / CHECKPOINTS
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                _lock(self._checkpoints, stack)
            self._remove_incomplete()
            self._put_torn_ones_aside()
            self._open = functools.partial(open_manager, self._checkpoints, keep, keep_every)
            self._manager = self._open()
            self._resources = stack.pop_all()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return newest_complete(self.home, PARTS)[0]

    def save(
        self,
        step: int,
        *,
        params: Any,
        opt_state: Any,
        data_state: Mapping[str, Any],
        wait: bool = False,
    ) -> None:
        """Saves a checkpoint in the background; the arrays may be donated when this returns.

        It first waits for the previous save.  If the step is already saved, it does nothing.  A
        failed save is reported to `on_error`, during this call or a later one; existing checkpoints
        and the run are not affected.

        Args:
          step: number of optimizer steps done.
          params: arrays, {"params": {...}, "router": {...}}.
          opt_state: any tree with at least one array.
          data_state: state of the data iterator, as JSON.
          wait: whether to wait until the checkpoint is on disk.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if self._exists(step):
            return
        self._remove_incomplete()
        items = {
            PARAMS: save_args(ocp, params),
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
        """If the last save has ended, reports its failure, if any; does not wait."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk, or has failed and been reported."""
        step, self._pending = self._pending, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            self._failed(step, error)
            return
        self._written(step)

    def _written(self, step: int) -> None:
        """Called when a checkpoint is on disk."""
        if self.on_saved is not None:
            self.on_saved(step)

    def _exists(self, step: int) -> bool:
        return (self._checkpoints / str(step)).exists()

    def close(self) -> None:
        """Waits for the last save and releases the lock of the directory."""
        self.wait()
        close_manager(self._manager)
        self._remove_incomplete()
        self._resources.close()

    def restore(
        self, step: int | None = None, *, like_params: Any, like_opt_state: Any
    ) -> tuple[int, Any, Any, dict[str, Any]]:
        """Restores a checkpoint, one array at a time; each device reads its shard.

        If the newest checkpoint turns out to be damaged, it is put aside with a warning, and the
        one before it is restored.

        Args:
          step: step to restore; None: the newest complete one.
          like_params, like_opt_state: trees of `jax.ShapeDtypeStruct` with the shapes, dtypes and
            shardings of this run; a sharding of None is the default device.

        Returns:
          (step, params, opt_state, data_state).

        Raises:
          CheckpointError: the step does not exist or is damaged, or arrays differ in name, shape or
            dtype; one message lists all differences.
        """
        self.wait()
        found = self._existing(step)
        while True:
            problem, restored = None, (None, None, {})
            try:
                restored = self._read(found, like_params, like_opt_state)
            except DamageError as error:
                problem = error
            if not _any_process(f"damaged/{self.path}/{found}", problem is not None):
                params, opt_state, data_state = restored
                return found, params, opt_state, data_state
            older = [one for one in complete_steps(self.home, PARTS) if one < found]
            if step is not None or not older:
                raise problem or DamageError(f"another process cannot read checkpoint {found}")
            close_manager(self._manager)
            if jax.process_index() == 0:
                self._put_aside(found, str(problem or "another process cannot read it"))
            self._manager = self._open()
            found = older[-1]

    def _read(
        self, step: int, like_params: Any, like_opt_state: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Reads one checkpoint; see `restore`."""
        parts = {PARAMS: like_params, OPT_STATE: like_opt_state}
        stores = {name: ParamStore(self.home / CHECKPOINTS / str(step) / name) for name in parts}
        problems = [
            f"{name}: {problem}"
            for name, like in parts.items()
            for problem in stores[name].differences(
                {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(like).items()}
            )
        ]
        if problems:
            raise CheckpointError(
                f"checkpoint {self.home / CHECKPOINTS / str(step)} does not match the configuration"
                " of this run; restore the old configuration, or start in a new workdir with"
                " init_from:\n" + listed(problems)
            )
        params, opt_state = (read_tree(stores[name], like) for name, like in parts.items())
        data_state = read_data_state(self.home / CHECKPOINTS / str(step))
        if data_state is None:
            raise DamageError(f"{DATA} is damaged")
        return params, opt_state, data_state

    def _existing(self, step: int | None) -> int:
        steps = complete_steps(self.home, PARTS)
        if step in all_steps(self.home) and step not in steps:
            what = defect(self.home / CHECKPOINTS / str(step), PARTS)
            raise CheckpointError(f"{self.home / CHECKPOINTS / str(step)} is not complete: {what}")
        if not steps:
            raise CheckpointError(f"{self.home} has no complete checkpoint yet")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.home} has no step {step}; it has {_some(steps)}")
        return steps[-1] if step is None else step

    def _failed(self, step: int, error: Exception) -> None:
        """Cleans up after a failed save and reports it."""
        close_manager(self._manager)  # threads of the save may still be running
        self._remove_incomplete()
        self._manager = self._open()
        self._report_failure(step, error)

    def _report_failure(self, step: int, error: Exception) -> None:
        """Reports a failed save to `on_error`."""
        steps = complete_steps(self.home, PARTS)
        if step in steps:
            message = f"checkpoint {step} is saved, but older ones could not be removed"
            self.on_error(f"{message}: {reason(error)}")
            return
        newest = f"the newest checkpoint is {steps[-1]}" if steps else "there is no checkpoint yet"
        self.on_error(
            f"checkpoint {step} could not be saved in {self.home / CHECKPOINTS}: {reason(error)};"
            f" {newest}, and the next save is attempted as usual"
        )

    def _put_torn_ones_aside(self) -> None:
        """Renames checkpoints that are newer than the newest complete one."""
        step, defects = newest_complete(self.home, PARTS)
        if is_remote(self.home):  # uploads that did not end were never checkpoints
            unfinished = [one for one in defects if one[1] == NO_MARKER]
            for one, what in unfinished:
                self._put_aside(one, what)
            defects = [one for one in defects if one not in unfinished]
        if step is None and defects:
            raise CheckpointError(
                f"{describe_defects(self.home, defects)}, and none is; restore one from a copy, or"
                " choose another workdir"
            )
        if jax.process_index() == 0:
            for torn, what in defects:
                self._put_aside(torn, what)

    def _put_aside(self, step: int, what: str) -> None:
        """Renames a checkpoint that cannot be used, so that its step can be saved again."""
        target = self._checkpoints / self._free_name(step, entries(self._checkpoints))
        (self._checkpoints / str(step)).rename(target)
        self.on_error(f"checkpoint {step} is not complete ({what}); it is now {target}, not used")

    def _free_name(self, step: int, taken: Collection[str]) -> str:
        """A name for a checkpoint that is put aside."""
        names = (f"{step}{_ASIDE}{'' if n == 1 else f'-{n}'}" for n in itertools.count(1))
        return next(name for name in names if name not in taken)

    def _remove_incomplete(self) -> None:
        """Removes incomplete checkpoints; must not be called during a save.

        TensorStore may still write files of a failed save, which creates the directory again or
        makes its removal fail.  So the removal is repeated until no such directory is left.
        """
        if jax.process_index() != 0:
            return
        for _ in range(_REMOVALS):
            incomplete = [entry for entry in self._checkpoints.iterdir() if TEMPORARY in entry.name]
            if not incomplete:
                return
            for entry in incomplete:
                shutil.rmtree(entry, ignore_errors=True)
            time.sleep(_REMOVAL_SECONDS)


def _any_process(name: str, flag: bool) -> bool:
    """Whether the flag is set in any process; `name` is that of the question."""
    if jax.process_count() == 1:
        return flag
    flags = gather_to_process_0(name, "1" if flag else "")
    return bool(broadcast_from_process_0(f"{name}/any", "".join(flags)))


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    """Locks the workdir; raises UserError if another process has locked it."""
    try:
        lock_directory(directory, stack)
    except BlockingIOError as error:
        raise UserError(
            f"another run is training in {directory.parent}; wait until it ends, or choose another"
            " workdir"
        ) from error
    except OSError:
        return  # the file system does not support locks


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[-8:]))
