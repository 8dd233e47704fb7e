"""A workdir on an object store: a local copy of its small files, and ownership.

Metrics, events and logs are appended to, which object stores cannot do.  So a run has them in a
temporary directory, and uploads those that have changed: with each checkpoint, and when it ends.
"""

import contextlib
import dataclasses
import json
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from vl2jax.checkpoints.completeness import CHECKPOINTS
from vl2jax.common.errors import UserError
from vl2jax.common.json_file import parse_object
from vl2jax.common.paths import AnyPath, is_remote
from vl2jax.common.storage import download, list_files, read_file, upload, write_file

OWNER = "owner.json"


@dataclasses.dataclass
class Mirror:
    """A workdir, and where it is on this machine.

    Attributes:
      path: the local directory: the workdir itself, or the copy of its small files.
      remote: the workdir on an object store; None: it is local.
    """

    path: Path
    remote: AnyPath | None = None

    def __post_init__(self):
        self._pushed = self._state()
        self._owner = {
            "run": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        }

    def own(self) -> None:
        """Makes this run the owner of the remote workdir.

        Object stores have no locks, and a run that was killed cannot give one back.  So the run
        that starts last owns the workdir, and an earlier one stops at its next save.
        """
        if self.remote is not None:
            write_file(self.remote / OWNER, json.dumps(self._owner).encode())

    def check_owner(self) -> None:
        """Raises UserError if another run has become the owner."""
        if self.remote is None:
            return
        try:
            found = parse_object(read_file(self.remote / OWNER))
        except (FileNotFoundError, ValueError):
            found = {}
        if found.get("run") != self._owner["run"]:
            raise UserError(
                f"another run (on {found.get('host', 'an unknown host')!s:.80}, started"
                f" {found.get('started', 'at an unknown time')!s:.40}) has taken over"
                f" {self.remote}; this one stops and saves nothing more"
            )

    def push(self) -> None:
        """Uploads the small files that have changed; process 0 does it alone."""
        if self.remote is None or jax.process_index() != 0:
            return
        for name, state in self._state().items():
            if self._pushed.get(name) != state:
                upload(self.path / name, self.remote / name)
                self._pushed[name] = state

    def _state(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of all small files, by relative path."""
        if self.remote is None:
            return {}
        found = {}
        for file in self.path.rglob("*"):
            name = file.relative_to(self.path).as_posix()
            if file.is_file() and not name.startswith(f"{CHECKPOINTS}/"):
                found[name] = (file.stat().st_size, file.stat().st_mtime_ns)
        return found


@contextlib.contextmanager
def mirrored(path: AnyPath, on_error: Callable[[str], None] = print) -> Iterator[Mirror]:
    """Context manager that gives a workdir as a local directory.

    Args:
      path: the workdir, local or on an object store.
      on_error: called with a message if the last upload fails.

    Raises:
      OSError: the object store cannot be read.
    """
    if not is_remote(path):
        yield Mirror(Path(path))
        return
    with tempfile.TemporaryDirectory(prefix="vl2jax-", ignore_cleanup_errors=True) as folder:
        for name in list_files(path):
            if not name.startswith((f"{CHECKPOINTS}/", "profile/")) and name != OWNER:
                download(path / name, Path(folder, name))
        mirror = Mirror(Path(folder), path)
        try:
            yield mirror
        finally:
            try:
                mirror.push()
            except OSError as error:
                on_error(f"the last files of the run could not be uploaded to {path}: {error}")
