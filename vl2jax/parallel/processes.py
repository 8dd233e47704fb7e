"""Runs of several processes: they connect, check that they agree, exchange messages, end together.

`jax.distributed` connects the processes.  When one of them ends, the others end too, see
`coordination.py`: without that they would hang in a collective.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from vl2jax.common.errors import UserError, clip
from vl2jax.parallel.coordination import Coordination, allow_connections

# Seconds by which JAX's timeout is longer than ours, because its error message does not help.
_JAX_EXTRA_TIMEOUT = 60
# Seconds without a heartbeat after which JAX takes a process for lost, and ends the others.
_HEARTBEAT_TIMEOUT = 30


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
    end of the block all processes wait for each other and disconnect.  After an error they do not:
    the process exits as soon as Python ends, with 1 or the code given to `exit_process`.

    Args:
      options: how to connect.

    Raises:
      UserError: the processes cannot be connected.
    """
    if not options.auto and not options.coordinator:
        yield
        return
    _initialize(options)
    state = _distributed_state()
    # By --process_id: the devices, which `jax.process_index` needs, are not there yet.
    coordination = Coordination(state.client, state.process_id, state.num_processes)
    if coordination.count == 1:
        yield
    else:
        coordination.watch(functools.partial(_end_with_others, coordination))
        try:
            with _own_output():
                yield
        except BaseException as error:
            # Otherwise JAX would wait for the other processes when Python ends.
            atexit.register(exit_process, 1)
            own = isinstance(error, UserError | OSError) or not isinstance(error, Exception)
            if own or "RESOURCE_EXHAUSTED" in str(error):
                coordination.report_error()
            else:  # JAX raises several types if a collective fails
                coordination.call_the_roll()
            raise
        coordination.finish()
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

    if options.process_id in (0, -1):  # -1: found by JAX
        allow_connections(options.num_processes)
    if options.process_id == 0 and options.coordinator:
        _check_port(int(options.coordinator.rpartition(":")[2]))
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
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        raise UserError(
            "--distributed found no SLURM, Open MPI, Kubernetes or Cloud TPU job to join; give"
            f" --coordinator, --num_processes and --process_id ({error})"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{name} cannot join the run: {clip(str(error), 300)}") from error
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
    return _messages().broadcast(name, text)


def gather_to_process_0(name: str, text: str) -> list[str]:
    """Gathers a text of each process on process 0, which waits for all of them.

    Args:
      name: name of the message; each call needs a new one.
      text: the text of this process, of any length.

    Returns:
      On process 0 the texts in the order of the processes; [] on the others.
    """
    return _messages().gather(name, text)


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
    return _messages().wait(name, seconds)


def must_wait_for_steps(platform: str) -> bool:
    """Returns whether each step must be finished before the next is dispatched.

    This is so for several processes on CPU, where gloo deadlocks if steps are dispatched ahead.

    Args:
      platform: "cpu", "gpu" or "tpu", where the steps run.
    """
    return jax.process_count() > 1 and platform == "cpu"


def exit_process(code: int) -> int:
    """Exits at once if the processes are still connected, which is so after an error.

    Python's normal exit would wait for the other processes.

    Args:
      code: the exit code.

    Returns:
      The exit code, if the processes are not connected.
    """
    if jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # it may be closed
                stream.flush()
        os._exit(code)
    return code


def _check_port(port: int) -> None:
    """Raises UserError if the port is taken; JAX's service may crash then."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"process 0 cannot use the port {port} of --coordinator on its host: {error}; choose a"
            " free one"
        ) from error


def _end(message: str) -> None:
    # `sys.__stderr__` is not redirected by `print_on_process_0`.
    print(f"error: {message}", file=sys.__stderr__, flush=True)
    os._exit(1)


def _end_with_others(coordination: Coordination, lost: Sequence[int]) -> None:
    """Exits because other processes have ended."""
    numbers = ", ".join(map(str, lost[:8])) + (f" and {len(lost) - 8} more" if lost[8:] else "")
    who, have, their = ("processes", "have", "their") if lost[1:] else ("process", "has", "its")
    _end(
        f"{who} {numbers} of {coordination.count} {have} ended, so process {coordination.index}"
        f" ends too; {their} own output has the reason. Start all processes again: the run resumes"
        " from what it has saved"
    )


def _messages() -> Coordination:
    client = _distributed_state().client
    return Coordination(client, jax.process_index(), jax.process_count())


def _distributed_state() -> Any:
    """JAX's client of its coordination service, which has no public API."""
    from jax._src import distributed

    return distributed.global_state


def _flat(tree: Any, path: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}.{name}")
    return found
