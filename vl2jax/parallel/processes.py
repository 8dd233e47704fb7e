"""Many processes as one run: they find each other, are of one mind, and end together.

JAX joins the processes (`jax.distributed`). Beside it each keeps a connection to process 0: when a
process ends, however, its connection closes, and all others say so and end at once, where JAX
alone would wait for a heartbeat that does not come, inside an operation that does not return.
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
_LINK, _TOLD = "vl2jax/link", "vl2jax/told"  # keys in JAX's store of the run
_LONG = 30 * 24 * 3600 * 1000  # milliseconds; of a process that is lost the link tells
_PIECE = 2**18  # characters of a message that are sent together
_JAX_GIVES_UP_LATER = 60  # seconds; it ends the process without a word that helps


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """How processes find each other.

    Attributes:
      auto: from SLURM, Open MPI, Kubernetes or Cloud TPU, as `jax.distributed.initialize` does.
      coordinator: host:port of process 0; "" for `auto`, or for a single process.
      num_processes, process_id: of all, and this one's; -1 where `auto` is to find them.
      timeout: seconds to wait for the others.
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
    """Joins the processes of a run; they part when it is over. Does nothing for a single one.

    Must come before anything is computed. While it lasts the end of one process ends all.

    Raises:
      UserError: nothing to join is found where `auto` asks for it.
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
            time.sleep(5)  # of a lost peer the link knows more, and ends this process meanwhile
            raise
        gather_to_process_0("end", "")
        broadcast_from_process_0("end")
        link.close()
    jax.distributed.shutdown()  # what comes later need not know of the others


def _initialize(options: DistributedOptions) -> None:
    known = options.num_processes >= 0
    count = f"all {options.num_processes} processes" if known else "all processes"
    name = f"process {options.process_id}" if options.process_id >= 0 else "this process"

    def late() -> None:
        _end(
            f"{name} waited {options.timeout} s and not {count} came together; start every process"
            " of the run with the same command, coordinator"
            f" {options.coordinator or 'as detected'}, and its own --process_id from 0 on"
        )

    alarm = threading.Timer(options.timeout, late)
    alarm.daemon = True
    alarm.start()
    given = {
        "coordinator_address": options.coordinator or None,
        "num_processes": options.num_processes if known else None,
        "process_id": options.process_id if options.process_id >= 0 else None,
    }
    # JAX would take SIGTERM for itself, and a program that does not ask it would not stop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given,
            cluster_detection_method=None if options.auto else "deactivate",
            initialization_timeout=options.timeout + _JAX_GIVES_UP_LATER,
        )
    except ValueError as error:
        raise UserError(
            "--distributed found no SLURM, Open MPI, Kubernetes or Cloud TPU job to join; give"
            f" --coordinator, --num_processes and --process_id ({error})"
        ) from error
    finally:
        alarm.cancel()


def assert_equal_across_processes(what: Mapping[str, Any], name: str = "config") -> None:
    """Refuses to go on where processes were started with different settings, or read other things.

    Args:
      what: nested settings, fit for JSON.
      name: of what is compared; no two have the same.

    Raises:
      UserError: this process has others than process 0.
    """
    if jax.process_count() == 1:
        return
    ours = json.loads(json.dumps(what))
    theirs = json.loads(broadcast_from_process_0(f"agree/{name}", json.dumps(what)))
    ours, theirs = _flat(ours, name), _flat(theirs, name)
    different = [
        f"{name} is {ours.get(name)!r}, there {theirs.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if not different:
        return
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    how, fix = f"has read {name} otherwise than process 0", "all need the same files"
    if name in ("config", "flags"):
        how = f"was started with {name} other than process 0's"
        fix = "start all with the same command"
    raise UserError(f"process {jax.process_index()} {how}: {', '.join(different[:3])}{more}; {fix}")


def broadcast_from_process_0(name: str, text: str = "") -> str:
    """What process 0 says, on every process.

    Args:
      name: of the message; no two have the same.
      text: the message; counts on process 0 only.
    """
    if jax.process_count() == 1:
        return text
    if is_process_0():
        _store().key_value_set(f"{_TOLD}/{name}", text)
        return text
    return _store().blocking_key_value_get(f"{_TOLD}/{name}", _LONG)


def gather_to_process_0(name: str, text: str) -> list[str]:
    """What every process says, on process 0, which waits for it; nothing on the others.

    Args:
      name: of the message; no two have the same.
      text: of any length.
    """
    me, count = jax.process_index(), jax.process_count()
    if me:
        pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
        for number, piece in enumerate(pieces):
            _store().key_value_set(f"{_TOLD}/{name}/{me}/{number}", piece)
        _store().key_value_set(f"{_TOLD}/{name}/{me}", str(len(pieces)))
        return []

    def said(process: int) -> str:
        key = f"{_TOLD}/{name}/{process}"
        pieces = int(_store().blocking_key_value_get(key, _LONG))
        return "".join(
            _store().blocking_key_value_get(f"{key}/{number}", _LONG) for number in range(pieces)
        )

    return [text, *(said(process) for process in range(1, count))]


def is_process_0() -> bool:
    """Whether this process speaks for the run: it prints, logs and writes single files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def print_on_process_0() -> Iterator[None]:
    """Drops what other processes than process 0 print; an error that is raised comes through."""
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
    """Leaves standard output to Python: what libraries print there (gloo) goes to the errors."""
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
    """Returns when all processes have called it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def must_wait_for_steps() -> bool:
    """Whether every step must have ended before the next begins.

    Over gloo (CPU), steps of several processes that are never waited for come to hang.
    """
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


def exit_process(code: int) -> int:
    """What a program ends with: where it has not parted from the others it does not wait for them.

    That is so after an error; those that are left are then told by the connection that closes.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _end(message: str) -> None:
    print(
        f"error: {message}", file=sys.__stderr__, flush=True
    )  # whatever `print_on_process_0` does
    os._exit(1)


def _store() -> Any:
    """JAX's key-value store of the run; there is no public way to it."""
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
    """Connections between process 0 and all others, watched by a thread."""

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
        """Parts in peace: the others are told before the connection closes."""
        self._closing = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(_BYE)

    def _accept(self, timeout: int) -> dict[int, socket.socket]:
        from jax._src import distributed

        address = distributed.global_state.coordinator_address
        assert address is not None  # processes have joined
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
                    heard = self._peers[key.data].recv(64)
                except OSError:
                    heard = b""
                if heard.endswith(_BYE):
                    self._selector.unregister(key.fileobj)
                elif heard:
                    self._lost(int(heard))
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
            " output says why. Start all processes again: the run goes on from what it has saved"
        )
