"""Ctrl-C and closed pipes, with real signals and a pseudo-terminal."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from convert import to_jax


@pytest.fixture(scope="module")
def command(data_dir, tmp_path_factory):
    """sample.py with a model that generates long answers."""
    target = tmp_path_factory.mktemp("interrupts") / "ckpt"
    to_jax.convert(data_dir / "mini-small", target)
    flags = ["--max_new_tokens", "3500", "--compilation_cache", str(ROOT / ".cache" / "jax")]
    return [sys.executable, str(ROOT / "sample.py"), "--ckpt", str(target), *flags]


class Terminal:
    """Runs a program on a pseudo-terminal and collects its output."""

    def __init__(self, command):
        import pty

        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.text, self._from = "", 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        while True:
            try:
                data = os.read(self._master, 4096)
            except OSError:  # the program has ended
                return
            self.text += data.decode(errors="replace")

    def write(self, line):
        os.write(self._master, f"{line}\n".encode())

    def expect(self, pattern, seconds=120):
        """Waits until the output after the previous match contains the pattern."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.compile(pattern).search(self.text, self._from)
            if found:
                self._from = found.end()
                return
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.text[self._from :]!r}")

    def interrupt(self):
        time.sleep(0.5)  # readline ignores signals shortly after it shows the prompt
        self.process.send_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on Windows")
def test_ctrl_c_stops_an_answer_then_leaves(command, tmp_path):
    terminal = Terminal(command)
    try:
        terminal.expect("ask about images")
        terminal.expect("> ")
        terminal.interrupt()
        terminal.expect("press Ctrl-C again to exit")
        for name in ("one", "two"):
            terminal.expect("> ")
            terminal.write("hello there")
            terminal.expect("hello there\r\n.*\\w")
            terminal.interrupt()
            terminal.expect("stopped")
            terminal.expect("> ")
            terminal.write(f"/save {tmp_path / name}")
            terminal.expect("saved [24] messages")
        terminal.expect("> ")
        terminal.interrupt()
        terminal.expect("press Ctrl-C again")
        terminal.expect("> ")
        terminal.interrupt()
        assert terminal.process.wait(60) == 130
        assert "Traceback" not in terminal.text
    finally:
        terminal.process.kill()
        terminal.process.wait()


def test_a_reader_that_has_seen_enough(command):
    """`sample.py ... | head -c 1`"""
    flags = [*command, "--prompt", "hello there"]
    process = subprocess.Popen(flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=False)
    assert len(process.stdout.read(1)) == 1
    process.stdout.close()
    told = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(120) == 0
    assert "Traceback" not in told and "rror" not in told
