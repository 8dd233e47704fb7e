"""Checkpoints of a workdir on an object store.

A checkpoint is written to a local directory first, and uploaded in a thread; its marker comes last,
so it is complete or ignored.  A run of several processes is refused.
"""

import concurrent.futures
import shutil
from collections.abc import Callable

import jax

from vl2jax.checkpoints.completeness import (
    CHECKPOINTS,
    MARKER,
    NO_MARKER,
    complete_steps,
    entries,
)
from vl2jax.common.errors import UserError
from vl2jax.common.storage import move_tree, remove_tree, upload
from vl2jax.training.mirror import Mirror
from vl2jax.training.workdir import PARTS, Workdir

_ALL = 2**31 - 1  # uploaded checkpoints are removed here, not by Orbax


class RemoteWorkdir(Workdir):
    """A `Workdir` whose complete checkpoints are on an object store."""

    def __init__(
        self,
        mirror: Mirror,
        *,
        keep: int,
        keep_every: int | None,
        on_error: Callable[[str], None] | None = None,
    ):
        """
        Args:
          mirror: the workdir.
          keep, keep_every, on_error: see `Workdir`.

        Raises:
          UserError: see `Workdir`; or there are several processes.
        """
        assert mirror.remote is not None
        if jax.process_count() > 1:
            raise UserError(
                f"{mirror.remote}: a run of several processes cannot save on an object store;"
                " mount the bucket (gcsfuse, s3fs), or use a shared file system"
            )
        self._mirror, self._keep, self._keep_every = mirror, keep, keep_every
        self._upload: tuple[int, concurrent.futures.Future] | None = None
        self._threads = concurrent.futures.ThreadPoolExecutor(1)
        super().__init__(
            mirror.path, keep=_ALL, keep_every=None, on_error=on_error, home=mirror.remote
        )
        mirror.own()

    def poll(self) -> None:
        """Starts or reports the upload of a checkpoint that is on disk; does not wait."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            super().wait()
        if self._upload is not None and self._upload[1].done():
            self._end_upload()

    def wait(self) -> None:
        """Waits until the last save is on the object store, or has failed and been reported."""
        super().wait()
        self._end_upload()

    def close(self) -> None:
        """Waits for the last save."""
        super().close()
        self._threads.shutdown()

    def _written(self, step: int) -> None:
        """Starts the upload of a checkpoint that is on disk."""
        self._end_upload()
        self._upload = step, self._threads.submit(self._store, step)

    def _end_upload(self) -> None:
        """Waits for the upload and reports it."""
        if self._upload is None:
            return
        (step, future), self._upload = self._upload, None
        try:
            future.result()
        except OSError as error:
            self._report_failure(step, error)
            return
        finally:
            shutil.rmtree(self.path / CHECKPOINTS / str(step), ignore_errors=True)
        if self.on_saved is not None:
            self.on_saved(step)

    def _store(self, step: int) -> None:
        """Uploads a checkpoint, its marker last, and the other files of the run."""
        self._mirror.check_owner()
        source, target = self.path / CHECKPOINTS / str(step), self.home / CHECKPOINTS / str(step)
        files = sorted(file for file in source.rglob("*") if file.is_file())
        for file in files:
            if file != source / MARKER:
                upload(file, target / file.relative_to(source).as_posix())
        upload(source / MARKER, target / MARKER)
        self._mirror.push()
        for old in self._surplus():
            remove_tree(self.home / CHECKPOINTS / str(old))

    def _surplus(self) -> list[int]:
        """Steps that are not to be kept."""
        steps, every = complete_steps(self.home, PARTS), self._keep_every
        return [one for one in steps[: -self._keep] if every is None or one % every]

    def _exists(self, step: int) -> bool:
        return step in complete_steps(self.home, PARTS)

    def _put_aside(self, step: int, what: str) -> None:
        """Removes an upload that did not end; renames a checkpoint that is damaged."""
        source = self.home / CHECKPOINTS / str(step)
        if what == NO_MARKER:
            remove_tree(source)
            return
        target = self._free_name(step, entries(self.home / CHECKPOINTS))
        move_tree(source, self.home / CHECKPOINTS / target)
        self.on_error(f"checkpoint {step} is not complete ({what}); it is now {target}, not used")


def open_workdir(mirror: Mirror, *, keep: int, keep_every: int | None) -> Workdir:
    """Opens a workdir, local or on an object store; see `Workdir`."""
    if mirror.remote is None:
        return Workdir(mirror.path, keep=keep, keep_every=keep_every)
    return RemoteWorkdir(mirror, keep=keep, keep_every=keep_every)
