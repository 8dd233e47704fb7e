"""Runs of several processes: they connect, check that they agree, exchange messages, end together.

`jax.distributed` connects the processes.  In addition, each process keeps a TCP connection to
process 0.  When a process ends for any reason, its connection closes, and all others print an error
and exit immediately.  With JAX alone they would hang in a collective until a heartbeat times out.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vl2jax.common.errors import UserError

_BYE = b"bye\n"
_LINK, _MESSAGES = "vl2jax/link", "vl2jax/told"  # keys in JAX's key-value store
_LONG_TIMEOUT = 30 * 24 * 3600 * 1000  # milliseconds; `_Link` detects processes that ended
_CHUNK = 2**18  # maximum number of characters per value in the store
# Seconds by which JAX's timeout is longer than ours, because its error message does not help.
_JAX_EXTRA_TIMEOUT = 60


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """Options for connecting processes, see `jax.distributed.initialize`.

    Attributes:
      auto: whether to detect the options from SLURM, Open MPI, Kubernetes or Cloud TPU.
      coordinator: host:port of process 0; "" with `auto` or for a single process.
      num_processes: number of processes; -1: detected with `auto`.
      process_id: number of this process; -1: detected with `auto`.
      timeout: seconds to wait for the other processes.

    Raises:
      UserError: the options contradict each other.
    """

    auto: bool = False
    coordinator: str = ""
    num_processes: int = -1
    process_id: int = -1
    timeout: int = 300

    def __post_init__(self):
        numbers = (self.num_processes, self.process_id)
        if self.coordinator and not self.auto and min(numbers) < 0:
            raise UserError(
                "--coordinator needs --num_processes and --process_id, or --distributed, which"
                " finds them"
            )
        if not self.coordinator and not self.auto and max(numbers) >= 0:
            raise UserError(
                "--num_processes and --process_id need --coordinator=HOST:PORT, the same in all"
                " processes: an address of process 0"
            )
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdecimal():
            raise UserError(f"--coordinator is {self.coordinator!r}, expected HOST:PORT")
        if self.process_id >= self.num_processes >= 0:
            raise UserError(
                f"--process_id is {self.process_id}, expected 0 to {self.num_processes - 1}"
            )


@contextlib.contextmanager
def distributed(options: DistributedOptions) -> Iterator[None]:
    """Context manager that connects the processes of a run; does nothing for a single process.

    Enter it before any JAX computation.  Inside, the end of one process ends all processes.  At the
    end of the block all processes wait for each other and disconnect.

    Args:
      options: how to connect.

    Raises:
      UserError: `auto` is set, but no supported cluster is detected.
    """
    if not options.auto and not options.coordinator:
        yield
        return
    _initialize(options)
    if jax.process_count() == 1:
        yield
    else:
        link = _Link(options.timeout)
        try:
            with _own_output():
                yield
        except jax.errors.JaxRuntimeError:
            # If a process was lost, `_Link` prints a better error and exits in the meantime.
            time.sleep(5)
            raise
        gather_to_process_0("end", "")
        broadcast_from_process_0("end")
        link.close()
    jax.distributed.shutdown()


def _initialize(options: DistributedOptions) -> None:
    known = options.num_processes >= 0
    count = f"all {options.num_processes} processes" if known else "all processes"
    name = f"process {options.process_id}" if options.process_id >= 0 else "this process"

    def exit_on_timeout() -> None:
        _end(
            f"{name} waited {options.timeout} s and not {count} came together; start every process"
            " of the run with the same command, coordinator"
            f" {options.coordinator or 'as detected'}, and its own --process_id from 0 on"
        )

    alarm = threading.Timer(options.timeout, exit_on_timeout)
    alarm.daemon = True
    alarm.start()
    given = {
        "coordinator_address": options.coordinator or None,
        "num_processes": options.num_processes if known else None,
        "process_id": options.process_id if options.process_id >= 0 else None,
    }
    # Otherwise JAX handles SIGTERM, and programs that do not poll its preemption service go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method=None if options.auto else "deactivate",
            initialization_timeout=options.timeout + _JAX_EXTRA_TIMEOUT,
        )
    except ValueError as error:
        raise UserError(
            "--distributed found no SLURM, Open MPI, Kubernetes or Cloud TPU job to join; give"
            f" --coordinator, --num_processes and --process_id ({error})"
        ) from error
    finally:
        alarm.cancel()


def assert_equal_across_processes(what: Mapping[str, Any], name: str = "config") -> None:
    """Checks that all processes have the same settings or data.

    Args:
      what: nested dict of JSON values.
      name: name of what is compared; each call needs a new one.

    Raises:
      UserError: the values of this process differ from those of process 0.
    """
    if jax.process_count() == 1:
        return
    ours = json.loads(json.dumps(what))
    theirs = json.loads(broadcast_from_process_0(f"agree/{name}", json.dumps(what)))
    ours, theirs = _flat(ours, name), _flat(theirs, name)
    different = [
        f"{name} is {ours.get(name)!r}, but {theirs.get(name)!r} on process 0"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if not different:
        return
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    how, fix = f"has read another {name} than process 0", "all processes need the same files"
    if name in ("config", "flags"):
        how = f"was started with {name} different from process 0's"
        fix = "start all processes with the same command"
    raise UserError(f"process {jax.process_index()} {how}: {', '.join(different[:3])}{more}; {fix}")


def broadcast_from_process_0(name: str, text: str = "") -> str:
    """Broadcasts a text from process 0.

    Args:
      name: name of the message; each call needs a new one.
      text: the message; ignored on other processes.

    Returns:
      The text of process 0, on every process.
    """
    if jax.process_count() == 1:
        return text
    if is_process_0():
        _store().key_value_set(f"{_MESSAGES}/{name}", text)
        return text
    return _store().blocking_key_value_get(f"{_MESSAGES}/{name}", _LONG_TIMEOUT)


def gather_to_process_0(name: str, text: str) -> list[str]:
    """Gathers a text of each process on process 0, which waits for all of them.

    Args:
      name: name of the message; each call needs a new one.
      text: the text of this process, of any length.

    Returns:
      On process 0 the texts in the order of the processes; [] on the others.
    """
    me, count = jax.process_index(), jax.process_count()
    if me:
        pieces = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
        for number, piece in enumerate(pieces):
            _store().key_value_set(f"{_MESSAGES}/{name}/{me}/{number}", piece)
        _store().key_value_set(f"{_MESSAGES}/{name}/{me}", str(len(pieces)))
        return []

    def receive(process: int) -> str:
        key = f"{_MESSAGES}/{name}/{process}"
        pieces = int(_store().blocking_key_value_get(key, _LONG_TIMEOUT))
        return "".join(
            _store().blocking_key_value_get(f"{key}/{number}", _LONG_TIMEOUT)
            for number in range(pieces)
        )

    return [text, *(receive(process) for process in range(1, count))]


def is_process_0() -> bool:
    """Returns whether this is process 0, which prints, logs and writes shared files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def print_on_process_0() -> Iterator[None]:
    """Context manager that discards the output of all processes but 0; exceptions propagate."""
    if is_process_0():
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def _own_output() -> Iterator[None]:
    """Redirects output that libraries (gloo) write to file descriptor 1 to standard error."""
    sys.stdout.flush()
    kept = sys.stdout
    with os.fdopen(os.dup(1), "w", encoding=kept.encoding, errors=kept.errors) as own:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(own):
                yield
        finally:
            own.flush()
            os.dup2(own.fileno(), 1)


def sync_processes(name: str) -> None:
    """Blocks until all processes have called it with the same name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def wait_together(name: str, seconds: float) -> bool:
    """Waits for all processes to call it with the same name.

    Args:
      name: name of the meeting; each call needs a new one.
      seconds: time to wait.

    Returns:
      Whether all have called it in time.
    """
    if jax.process_count() == 1:
        return True
    try:
        _store().wait_at_barrier(f"{_MESSAGES}/{name}", round(seconds * 1000))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def must_wait_for_steps(platform: str) -> bool:
    """Returns whether each step must be finished before the next is dispatched.

    This is so for several processes on CPU, where gloo deadlocks if steps are dispatched ahead.

    Args:
      platform: "cpu", "gpu" or "tpu", where the steps run.
    """
    return jax.process_count() > 1 and platform == "cpu"


def exit_process(code: int) -> int:
    """Exits at once if the processes are still connected, which is so after an error.

    Python's normal exit would wait for the other processes.  The closed connection ends them.

    Args:
      code: the exit code.

    Returns:
      The exit code, if the processes are not connected.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _end(message: str) -> None:
    # `sys.__stderr__` is not redirected by `print_on_process_0`.
    print(f"error: {message}", file=sys.__stderr__, flush=True)
    os._exit(1)


def _store() -> Any:
    """JAX's key-value store, which has no public API."""
    from jax._src import distributed

    return distributed.global_state.client


def _flat(tree: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}.{name}")
    return found


class _Link:
    """TCP connections between process 0 and all others; a thread detects when one closes."""

    def __init__(self, timeout: int):
        self._me, self._count = jax.process_index(), jax.process_count()
        self._selector, self._closing = selectors.DefaultSelector(), False
        self._peers = self._accept(timeout) if self._me == 0 else self._connect(timeout)
        for number, peer in self._peers.items():
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            peer.settimeout(None)
            self._selector.register(peer, selectors.EVENT_READ, number)
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Announces a regular exit, so that the closed connection is not taken for a lost one."""
        self._closing = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(_BYE)

    def _accept(self, timeout: int) -> dict[int, socket.socket]:
        from jax._src import distributed

        address = distributed.global_state.coordinator_address
        assert address is not None  # `jax.distributed` is initialized
        host = address.rpartition(":")[0]
        server = socket.create_server(("", 0))
        server.settimeout(timeout)
        _store().key_value_set(_LINK, f"{host}:{server.getsockname()[1]}")
        found: dict[int, socket.socket] = {}
        with contextlib.closing(server), contextlib.suppress(TimeoutError):
            while len(found) < self._count - 1:
                peer, _ = server.accept()
                found[int(peer.recv(16))] = peer
        absent = sorted(set(range(1, self._count)) - set(found))
        if absent:
            _end(f"no connection came from process {', '.join(map(str, absent))} in {timeout} s")
        return found

    def _connect(self, timeout: int) -> dict[int, socket.socket]:
        address = _store().blocking_key_value_get(_LINK, timeout * 1000)
        host, _, port = address.rpartition(":")
        try:
            peer = socket.create_connection((host.strip("[]"), int(port)), timeout)
        except OSError as error:
            raise UserError(
                f"process {self._me} cannot reach process 0 at {address}: {error}"
            ) from error
        peer.sendall(str(self._me).encode())
        return {0: peer}

    def _watch(self) -> None:
        while self._selector.get_map():
            for key, _ in self._selector.select():
                try:
                    received = self._peers[key.data].recv(64)
                except OSError:
                    received = b""
                if received.endswith(_BYE):
                    self._selector.unregister(key.fileobj)
                elif received:
                    self._lost(int(received))
                elif not self._closing:
                    self._lost(key.data)
                else:
                    self._selector.unregister(key.fileobj)

    def _lost(self, number: int) -> None:
        for peer in self._peers.values() if self._me == 0 else ():
            with contextlib.suppress(OSError):
                peer.sendall(f"{number}\n".encode())
        _end(
            f"process {number} of {self._count} has ended, so process {self._me} ends too; its own"
            " output has the reason. Start all processes again: the run resumes from what it has"
            " saved"
        )
