"""`--batch`: killed at any time, it goes on without losing or doubling a row."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from convert import to_jax
from vl2jax.answer_file import answer_file, part_of
from vl2jax.errors import UserError
from vl2jax.session import Session

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ckpt(data_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("answer_file") / "ckpt"
    to_jax.convert(data_dir / "mini-small", target)
    return target


@pytest.fixture(scope="module")
def session(ckpt):
    return Session(ckpt, max_new_tokens=6, seed=3)


def questions(count):
    rows = [{"prompt": f"what is {n}?", "id": f"q{n}"} for n in range(count)]
    rows[2] = {"prompt": "<image>", "images": ["absent.png"], "id": "q2"}
    return "\n\n".join(json.dumps(row) for row in rows) + "\n"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(rows):
    """Answers without their times."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture(scope="module")
def whole(session, tmp_path_factory):
    """A file of questions and its answers, in one run."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "in.jsonl").write_text(questions(9))
    assert answer_file(session, folder / "in.jsonl", folder / "out.jsonl", 4) == 1
    return folder / "in.jsonl", folder / "out.jsonl"


def test_any_beginning_is_continued(session, whole, tmp_path, capsys):
    source, want = whole
    lines = want.read_bytes().splitlines(keepends=True)
    assert [row["id"] for row in read(want)] == [f"q{n}" for n in range(9)]
    assert [row["row"] for row in read(want)] == list(range(1, 18, 2))
    for kept, torn in ((0, 5), (1, 0), (4, 40), (8, 1), (9, 0)):
        target = tmp_path / f"{kept}.jsonl"
        target.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept:])[:torn])
        assert answer_file(session, source, target, 4) == 1
        assert same(read(target)) == same(read(want))
        assert target.read_bytes().startswith(b"".join(lines[:kept]))
    assert "8 of 9 rows are answered already" in capsys.readouterr().err


def test_other_rows_or_flags_are_not_continued(ckpt, session, whole, tmp_path):
    source, want = whole
    target = tmp_path / "out.jsonl"
    target.write_bytes(want.read_bytes())
    with pytest.raises(UserError, match="line 1 does not answer row 1"):
        answer_file(Session(ckpt, max_new_tokens=7, seed=3), source, target, 4)
    (tmp_path / "in.jsonl").write_text(questions(9).replace("what is 5", "who is 5"))
    with pytest.raises(UserError, match="line 6 does not answer row 11"):
        answer_file(session, tmp_path / "in.jsonl", target, 4)
    (tmp_path / "in.jsonl").write_text(questions(5))
    with pytest.raises(UserError, match="more rows"):
        answer_file(session, tmp_path / "in.jsonl", target, 4)
    assert target.read_bytes() == want.read_bytes()


def test_processes_share_the_rows(session, whole, tmp_path):
    source, want = whole
    target = tmp_path / "out.jsonl"
    parts = [(index, 2) for index in range(2)]
    assert sum(answer_file(session, source, target, 4, part) for part in parts) == 1
    found = [row for part in parts for row in read(part_of(target, part))]
    assert same(sorted(found, key=lambda row: row["row"])) == same(read(want))
    assert not target.exists()
    assert part_of(target, (1, 2)).name == "out-00001-of-00002.jsonl"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_run_goes_on(ckpt, session, tmp_path):
    """Killed as soon as some answers are there, wherever it is then; the next run does the rest."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(questions(200))
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--batch", source]
    flags = ["--out", target, "--max_new_tokens", "6", "--seed", "3", "--batch_size", "4"]
    cache = ["--compilation_cache", ROOT / ".cache" / "jax"]
    process = subprocess.Popen([*command, *flags, *cache], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (target.exists() and target.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    before = target.read_bytes()
    assert 0 < before.count(b"\n") < 200
    assert answer_file(_like_the_program(ckpt), source, target, 4) == 1
    assert [row["id"] for row in read(target)] == [f"q{n}" for n in range(200)]
    assert target.read_bytes().startswith(before[: before.rindex(b"\n") + 1])


def _like_the_program(ckpt):
    """A session with the options that sample.py gives it."""
    options = dict(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    options |= dict(stop=[], seed=3, chunk_size=0, max_new_tokens=6)
    return Session(ckpt, **options)
