"""`--batch` resumes after a kill at any time, without missing or duplicate rows."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time

import PIL.Image
import pytest
from conftest import ROOT

from convert import to_jax
from vl2jax.cli import batch_processes
from vl2jax.cli.batch import answer_batch, shard_path
from vl2jax.cli.shards import Shard
from vl2jax.common.errors import UserError
from vl2jax.data.files import open_rows
from vl2jax.inference.request import from_prompt, read_question_at
from vl2jax.inference.session import Session
from vl2jax.synthetic.__main__ import main as write_synthetic


@pytest.fixture(scope="module")
def ckpt(data_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("answer_batch") / "ckpt"
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
    """Removes the times from answers."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture(scope="module")
def whole(session, tmp_path_factory):
    """A file of questions, and its answers by an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "in.jsonl").write_text(questions(9))
    assert answer_batch(session, folder / "in.jsonl", folder / "out.jsonl", 4) == 1
    return folder / "in.jsonl", folder / "out.jsonl"


def test_any_beginning_is_continued(session, whole, tmp_path, capsys):
    source, want = whole
    lines = want.read_bytes().splitlines(keepends=True)
    assert [row["id"] for row in read(want)] == [f"q{n}" for n in range(9)]
    assert [row["row"] for row in read(want)] == list(range(1, 18, 2))
    for kept, torn in ((0, 5), (1, 0), (4, 40), (8, 1), (9, 0)):
        target = tmp_path / f"{kept}.jsonl"
        target.write_bytes(b"".join(lines[:kept]) + b"".join(lines[kept:])[:torn])
        assert answer_batch(session, source, target, 4) == 1
        assert same(read(target)) == same(read(want))
        assert target.read_bytes().startswith(b"".join(lines[:kept]))
    assert "8 of 9 rows are already answered" in capsys.readouterr().err


def test_rows_of_training_data_are_asked_without_their_answers(session, whole, tmp_path):
    """Rows in the format of LLaVA, as lines and as one JSON list; bad rows get an error."""
    _, want = whole
    turns = [{"from": "human", "value": "what is 0?"}, {"from": "gpt", "value": "Zero."}]
    messages = [{"role": "user", "content": "what is 1?"}, {"role": "assistant", "content": "One."}]
    rows = [
        {"id": "a", "conversations": turns},
        {"id": "b", "messages": messages},
        {"id": "c", "conversations": turns[1:]},
        {"id": "d", "conversations": [turns[0] | {"from": "robot"}]},
        {"id": "e", "image": "absent.png", "conversations": turns},
        {"id": "f", "conversations": [*turns[:1], *turns]},
        {"id": "g"},
        "no row",
        {"id": "i", "conversations": turns[:1]},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("in.json", "in.jsonl"):
        target = tmp_path / f"out-{name}"
        assert answer_batch(session, tmp_path / name, target, 4) == 6
        found = read(target)
        assert [row["row"] for row in found] == list(range(1, 10))
        assert [row.get("id") for row in found] == [*"abcdefg", None, "i"]
        tokens = [row["tokens"] for row in read(want)[:2]]
        assert [found[i]["tokens"] for i in (0, 1, 8)] == [*tokens, tokens[0]]
        errors = [row["error"]["message"] for row in found if "error" in row]
        for error, part in zip(
            errors,
            (
                "nothing is asked",
                "message 1: unknown role 'robot'",
                "image 1: ",
                "message 2: role 'user' where 'assistant' is due",
                "or a document under 'text'; got the keys ['id']",
                "or a document under 'text'; got str",
            ),
            strict=True,
        ):
            assert part in error


def test_synthetic_rows_are_questions(tmp_path):
    """Rows of `vl2jax.synthetic` become prompts of the turns before the last answer."""
    assert write_synthetic(["--out", str(tmp_path), "-n", "5"]) == 0
    rows = json.loads((tmp_path / "data.json").read_text())
    for index, row in enumerate(rows):
        request = read_question_at(open_rows(tmp_path / "data.json"), index)
        said = [turn["value"].strip() for turn in row["conversations"]]
        assert [turn["content"] for turn in request.conversation] == said[:-1]
        assert request.conversation[-1]["role"] == "user"
        paths = [row["image"]] if isinstance(row.get("image"), str) else row.get("image", [])
        assert request.images == [str(tmp_path / path) for path in paths]
    assert any("image" in row for row in rows)


def test_the_same_files_as_in_training(session, whole, tmp_path):
    """A batch reads files of every kind, and gives the same answers to the same rows."""
    _, want = whole
    rows = [{"id": n, "prompt": f"what is {n}?"} for n in range(2)]
    lines = "\n".join(map(json.dumps, rows))
    listed = json.dumps(rows, indent=1)
    (tmp_path / "bom.json").write_text(listed, encoding="utf-8-sig")
    (tmp_path / "utf16.json").write_text(listed, encoding="utf-16")
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": rows}, indent=1))
    (tmp_path / "lines.txt").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.jsonl").write_text(listed)
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 8
    for name in names:
        assert answer_batch(session, tmp_path / name, tmp_path / f"out-{name}", 4) == 0
        found = read(tmp_path / f"out-{name}")
        assert [row["id"] for row in found] == [0, 1]
        assert [row["tokens"] for row in found] == [row["tokens"] for row in read(want)[:2]]
    (tmp_path / "one.json").write_text(json.dumps({"messages": _asked("what is 0?")}, indent=1))
    assert answer_batch(session, tmp_path / "one.json", tmp_path / "one.out", 4) == 0
    assert read(tmp_path / "one.out")[0]["tokens"] == read(want)[0]["tokens"]
    for name, text in (
        ("cut.json", listed[:-9]),
        ("cut.jsonl", listed[:-9]),
        ("a.csv", "a,b\n1,2"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}:\d+: not valid JSON"):
            answer_batch(session, tmp_path / name, tmp_path / "none.out", 4)


def _asked(text):
    return [{"role": "user", "content": text}]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_read(session, whole, tmp_path):
    source, want = whole
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[source.read_bytes()])
    writer.start()
    assert answer_batch(session, tmp_path / "pipe", tmp_path / "out.jsonl", 4) == 1
    writer.join()
    found = [row.get("tokens") for row in read(tmp_path / "out.jsonl")]
    assert found == [row.get("tokens") for row in read(want)] and found.count(None) == 1


def test_failed_rows_are_retried(session, whole, tmp_path, capsys):
    """A row is corrected in the file, an image appears, and a third row stays bad."""
    lines = [json.dumps({"prompt": f"what is {n}?", "id": n}) for n in range(6)]
    corrected, lines[1] = lines[1], lines[1][:9]
    lines[3] = json.dumps({"prompt": "<image>", "images": ["a.png"], "id": 3})
    lines[4] = json.dumps({"messages": [], "id": 4})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    assert answer_batch(session, source, target, 4) == 3
    first = target.read_bytes().splitlines()
    assert answer_batch(session, source, target, 4) == 3  # not without the flag
    source.write_text("\n".join([lines[0], corrected, *lines[2:]]))
    with pytest.raises(UserError, match="line 2 does not answer row 2"):
        answer_batch(session, source, target, 4)
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert answer_batch(session, source, target, 4, retry_errors=True) == 1
    assert "3 rows with an error are answered again" in capsys.readouterr().err
    found = read(target)
    assert [row["id"] for row in found] == list(range(6)) and "error" in found[4]
    assert all("error" not in row for row in found if row["id"] != 4)
    after = target.read_bytes().splitlines()
    assert [after[n] for n in (0, 2, 5)] == [first[n] for n in (0, 2, 5)]
    assert found[1]["tokens"] == read(whole[1])[1]["tokens"]
    assert answer_batch(session, source, target, 4) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "in.jsonl", "out.jsonl"]


def test_each_process_retries_its_own_rows(session, tmp_path):
    rows = [{"prompt": "<image>a", "images": [f"{n}.png"], "id": n} for n in range(4)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert sum(answer_batch(session, source, target, 2, (index, 2)) for index in (0, 1)) == 4
    for n in (0, 1, 2):
        PIL.Image.new("RGB", (40, 30)).save(tmp_path / f"{n}.png")
    assert answer_batch(session, source, target, 2, (1, 2), retry_errors=True) == 1
    assert ["error" in row for row in read(shard_path(target, (1, 2)))] == [False, True]
    assert ["error" in row for row in read(shard_path(target, (0, 2)))] == [True, True]


def test_processes_share_each_fact_once_in_a_retry(session, tmp_path, monkeypatch):
    """A fact is shared under a name, and a name can be used only once."""
    names = []

    def share(name, text):
        assert name not in names
        names.append(name)
        return text

    rows = [{"prompt": "<image>a", "images": [f"{n}.png"], "id": n} for n in range(2)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert answer_batch(session, source, target, 2) == 2
    PIL.Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    monkeypatch.setattr(batch_processes, "broadcast_from_process_0", share)
    monkeypatch.setattr(
        batch_processes, "assert_equal_across_processes", lambda what, name: share(name, what)
    )
    together = Shard(None, 0, 0)
    assert together.together
    answer = batch_processes.answer_batch_by_processes
    assert answer(session, source, target, 2, together, retry_errors=True) == 1
    assert ["error" in row for row in read(target)] == [False, True] and len(names) > 4


def test_an_interrupted_retry_is_continued(session, tmp_path):
    rows = [{"prompt": "<image>a", "images": [f"{n}.png"], "id": n} for n in range(3)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert answer_batch(session, source, target, 2) == 3
    before = target.read_bytes()
    for n in range(3):
        PIL.Image.new("RGB", (40, 30 + 9 * n)).save(tmp_path / f"{n}.png")
    assert answer_batch(session, source, target, 2, retry_errors=True) == 0
    whole, side = target.read_bytes(), tmp_path / ".out.jsonl.retry"
    target.write_bytes(before)
    side.write_bytes(whole.splitlines(keepends=True)[0] + b"{torn")
    assert answer_batch(session, source, target, 2, retry_errors=True) == 0
    assert target.read_bytes().startswith(whole.splitlines()[0])
    assert same(read(target)) == same(map(json.loads, whole.splitlines())) and not side.exists()


def test_keys_that_are_not_read_are_said_once(session, tmp_path, capsys):
    rows = [{"prompt": "a", "mood": 3, "id": n} for n in range(3)] + [{"prompt": "a", "tone": 1}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert answer_batch(session, tmp_path / "in.jsonl", tmp_path / "out.jsonl", 2) == 0
    err = capsys.readouterr().err
    assert err.count("['mood'] of rows are not read") == err.count("['tone'] of rows") == 1


def test_other_rows_or_flags_are_not_continued(ckpt, session, whole, tmp_path):
    source, want = whole
    target = tmp_path / "out.jsonl"
    target.write_bytes(want.read_bytes())
    with pytest.raises(UserError, match="line 1 does not answer row 1"):
        answer_batch(Session(ckpt, max_new_tokens=7, seed=3), source, target, 4)
    (tmp_path / "in.jsonl").write_text(questions(9).replace("what is 5", "who is 5"))
    with pytest.raises(UserError, match="line 6 does not answer row 11"):
        answer_batch(session, tmp_path / "in.jsonl", target, 4)
    (tmp_path / "in.jsonl").write_text(questions(5))
    with pytest.raises(UserError, match="more rows"):
        answer_batch(session, tmp_path / "in.jsonl", target, 4)
    assert target.read_bytes() == want.read_bytes()


def test_processes_share_the_rows(session, whole, tmp_path):
    source, want = whole
    target = tmp_path / "out.jsonl"
    parts = [(index, 2) for index in range(2)]
    assert sum(answer_batch(session, source, target, 4, part) for part in parts) == 1
    found = [row for part in parts for row in read(shard_path(target, part))]
    assert same(sorted(found, key=lambda row: row["row"])) == same(read(want))
    assert not target.exists()
    assert shard_path(target, (1, 2)).name == "out-00001-of-00002.jsonl"


def test_several_answers_to_each_row(ckpt, session, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(questions(3))
    options = dict(max_new_tokens=4, temperature=1.0, seed=5)
    assert answer_batch(Session(ckpt, **options, n=2), source, target, 4) == 1
    rows = read(target)
    assert [row["id"] for row in rows] == ["q0", "q1", "q2"]
    assert "error" in rows[2] and "answers" not in rows[2]
    for row in rows[:2]:
        first, second = row["answers"]
        assert first["tokens"] != second["tokens"]
        assert first["finish_reason"] == second["finish_reason"] == "length"


def test_logits_that_are_not_finite_are_an_error_of_their_row(ckpt, tmp_path):
    """The other rows are answered, and the row counts as bad, also when the run is resumed."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["no", "what is this?", "no or"]
    source.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    session = Session(ckpt, max_new_tokens=3)
    model = session.load()
    others = [session.prepare(from_prompt(prompts[i])).tokens.tolist() for i in (0, 2)]
    asked = session.prepare(from_prompt(prompts[1])).tokens.tolist()
    bad = next(token for token in asked if token not in [*others[0], *others[1]])
    table = model.params["params"]["decoder"]["embed_tokens"]
    table["embedding"] = table["embedding"].at[bad].set(float("nan"))
    assert answer_batch(session, source, target, 4) == 1
    rows = read(target)
    assert rows[1]["finish_reason"] == "error" and rows[1]["tokens"] == []
    assert "not finite" in rows[1]["error"]["message"]
    assert [len(rows[i]["tokens"]) for i in (0, 2)] == [3, 3]
    assert "error" not in rows[0]
    assert answer_batch(session, source, target, 4) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_killed_run_goes_on(ckpt, session, tmp_path):
    """The run is killed after its first answers; the next run answers the other rows."""
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
    assert answer_batch(_like_the_program(ckpt), source, target, 4) == 1
    assert [row["id"] for row in read(target)] == [f"q{n}" for n in range(200)]
    assert target.read_bytes().startswith(before[: before.rindex(b"\n") + 1])


def _like_the_program(ckpt):
    """A session with the same options as in sample.py."""
    options = dict(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)
    options |= dict(stop=[], seed=3, chunk_size=0, max_new_tokens=6)
    return Session(ckpt, **options)
