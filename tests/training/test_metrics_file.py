"""Metrics files: incomplete and malformed lines, truncation when a run resumes."""

import errno
import os

import pytest

from vl2jax.common.errors import UserError
from vl2jax.training.metrics_file import drop_after, read_metrics


def test_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": [1.5, null]}\n{"step": 2, "a": nu')
    assert read_metrics(path) == [{"step": 1, "a": [1.5, None]}]
    path.write_text('{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is not a JSON object"):
        read_metrics(path)


def test_dropping(tmp_path):
    path = tmp_path / "m.jsonl"
    assert drop_after(path, 3) == 0 and not path.exists()
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole)
    inode = path.stat().st_ino
    assert drop_after(path, 2) == 0 and path.stat().st_ino == inode  # not rewritten
    path.write_bytes(b'{"step": 1}\n\x00\x00\n{"step": 2}')  # only the newline is missing
    assert drop_after(path, 2) == 1 and path.read_bytes() == whole
    assert drop_after(path, 0) == 2 and path.read_bytes() == b""


def test_dropping_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        drop_after(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
