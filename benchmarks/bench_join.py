"""Simulates the joining and ending of a run of many processes.

    python benchmarks/bench_join.py --processes 2000 --strays 200
    python benchmarks/bench_join.py --processes 700 --files 1024
    python benchmarks/bench_join.py --processes 2000 --end lost

This process is process 0, with JAX's coordination service.  The others are threads of a few worker
processes; each has a client and a connection of its own.  They join, get a text of process 0, and
send one to it.  Then the run ends: regularly, by an error of one process, or because processes are
killed and a collective of another fails.  Meanwhile strays connect to the service: they say
nothing, leave, or send HTTP, TLS or noise.  Prints one JSON line.
"""

import argparse
import importlib
import itertools
import json
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from vl2jax.parallel.coordination import Coordination, allow_connections

_jax: Any = importlib.import_module("jaxlib._jax")  # JAX has no public way to its clients

TIMEOUT = 300  # seconds
TEXT = "x" * 20_000  # about the size of a configuration
STRAYS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    bytes.fromhex("160301007a010000760303") + bytes(range(100)),  # the hello of TLS
    b"\0" * 4096,
    b"1\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


def connect(address: str, index: int, count: int) -> Coordination:
    """Joins as one process."""
    client = _jax.get_distributed_runtime_client(
        address, index, init_timeout=TIMEOUT, use_compression=True, heartbeat_timeout=60
    )
    client.connect()
    return Coordination(client, index, count)


def work(first: int, last: int, count: int, port: int, end: str) -> None:
    """Is the processes from `first` to `last` - 1; prints what each heard of the end."""
    heard: queue.Queue[list[int]] = queue.Queue()
    joined = []  # a client that is deleted waits for the others

    def one(index: int) -> None:
        # An address of its own for each, because equal addresses would share a connection.
        host = f"127.{1 + index // 62500}.{index // 250 % 250}.{1 + index % 250}"
        coordination = connect(f"{host}:{port}", index, count)
        joined.append(coordination)
        coordination.watch(lambda lost: heard.put(list(lost)))
        assert coordination.broadcast("config", "") == TEXT
        coordination.gather("ready", str(index))
        if end == "regular":
            coordination.finish()
            heard.put([])
        elif index == 1:
            coordination.broadcast("go", "")
            (coordination.report_error if end == "error" else coordination.call_the_roll)()

    threading.stack_size(2**18)
    for index in range(first, last):
        threading.Thread(target=one, args=(index,), daemon=True).start()
    reporter = end == "error" and first == 1  # it does not hear its own report
    found = [heard.get(timeout=TIMEOUT) for _ in range(last - first - reporter)]
    print(json.dumps([min(found), max(found)]), flush=True)
    os._exit(0)


def be_strays(number: int, port: int) -> None:
    """Connects to the service again and again, until this process is killed."""
    held = []
    for i in range(number):
        stray = socket.create_connection(("localhost", port))
        stray.sendall(STRAYS[i % len(STRAYS)])
        if i % 3 == 0:
            stray.close()
        elif i % 3 == 1:
            stray.shutdown(socket.SHUT_WR)
        held.append(stray)
    print("connected", flush=True)
    time.sleep(2 * TIMEOUT)


def run(processes: int, workers: int, strays: int, files: int, end: str) -> None:
    """Is process 0; prints the result and exits."""
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    allow_connections(processes)
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    _service = _jax.get_distributed_runtime_service(
        f"[::]:{port}", processes, heartbeat_timeout=60, shutdown_timeout=TIMEOUT
    )

    def start(*role: object) -> subprocess.Popen:
        command = [sys.executable, __file__, "--role", *map(str, role)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    others = []
    if strays:
        others.append(start("strays", strays, port))
        assert others[0].stdout.readline() == "connected\n"
    started = time.perf_counter()
    edges = [1 + (processes - 1) * i // workers for i in range(workers + 1)]
    pairs = itertools.pairwise(edges)
    crew = [start("worker", first, last, processes, port, end) for first, last in pairs]
    heard: queue.Queue[list[int]] = queue.Queue()
    coordination = connect(f"localhost:{port}", 0, processes)
    joined = time.perf_counter()
    coordination.watch(lambda lost: heard.put(list(lost)))
    coordination.broadcast("config", TEXT)
    ready = coordination.gather("ready", "0")
    assert ready == [str(i) for i in range(processes)]
    told, open_files = time.perf_counter(), len(os.listdir("/proc/self/fd"))
    if end == "lost":
        crew.pop().kill()
    if end == "regular":
        coordination.finish()
    else:
        coordination.broadcast("go", "")
        heard.put(heard.get(timeout=TIMEOUT))
    ends = [json.loads(worker.communicate(timeout=TIMEOUT)[0]) for worker in crew]
    ended = time.perf_counter()
    for other in others:
        other.kill()
    expected = {"regular": [], "error": [1], "lost": list(range(edges[-2], processes))}[end]
    assert all(each == [expected, expected] for each in ends), (ends, expected)
    assert end == "regular" or heard.get() == expected
    result = {
        "processes": processes,
        "strays": strays,
        "file_limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "open_files": open_files,
        "join_seconds": round(joined - started, 2),
        "message_seconds": round(told - joined, 2),
        "end": end,
        "end_seconds": round(ended - told, 2),
    }
    print(json.dumps(result), flush=True)
    os._exit(0)  # to delete the client and the service would wait for the others


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulates many processes of a run.")
    parser.add_argument("--processes", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=4, help="processes that simulate the others")
    parser.add_argument("--strays", type=int, default=0, help="connections that are not of the run")
    parser.add_argument("--files", type=int, default=0, help="limit of open files (ulimit -n)")
    parser.add_argument("--end", choices=("regular", "error", "lost"), default="regular")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role and args.role[0] == "worker":
        first, last, count, port = map(int, args.role[1:5])
        work(first, last, count, port, args.role[5])
    elif args.role:
        be_strays(int(args.role[1]), int(args.role[2]))
    else:
        run(args.processes, args.workers, args.strays, args.files, args.end)


if __name__ == "__main__":
    main()
