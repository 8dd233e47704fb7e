"""Starts programs of the repository as several processes of one run, as a user would."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

long_test = pytest.mark.skipif(
    os.environ.get("VL2JAX_PROCESSES") != "all", reason="set VL2JAX_PROCESSES=all"
)


def start(program: str, devices: int, *arguments) -> subprocess.Popen:
    """Starts one process with this number of CPU devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, program, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_two(
    program: str, devices: int, *arguments, second: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts processes 0 and 1 of a run; `second`: additional arguments of process 1."""
    join = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--join_timeout=60"]
    first = start(program, devices, *arguments, *join, "--process_id=0")
    return [first, start(program, devices, *arguments, *join, "--process_id=1", *second)]


def finish(*processes: subprocess.Popen) -> list[tuple[int, str, str]]:
    """Waits for processes and kills those that hang; returns exit code, output and errors."""
    found = []
    for process in processes:
        try:
            output, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
        found.append((process.returncode, output, errors))
    return found


def assert_names_lost(ended: tuple[int, str, str], lost: int) -> None:
    """Asserts that a process of two ended because the other one was killed, and named it.

    A collective fails, which calls the roll; or heartbeats are missing, and JAX ends the process.
    """
    code, _, errors = ended
    reports = (f"error: process {lost} of 2 has ended", f"(stopped sending heartbeats):\n{lost}\n")
    assert code in (1, -signal.SIGABRT)
    assert any(report in errors for report in reports), errors
