"""sample.py and eval.py in two processes, started as a user starts them, against one process.

VL2JAX_PROCESSES=all also runs the slow tests.
"""

import json
import signal
import time

import jax
import pytest
from conftest import ROOT
from processes import assert_names_lost, finish, long_test, start_two

from convert import random_hf, to_jax
from vl2jax.cli.batch import shard_path
from vl2jax.cli.batch_processes import _append_parts, _refuse_other_parts
from vl2jax.cli.shards import choose_shard
from vl2jax.common.errors import UserError
from vl2jax.programs import eval as program
from vl2jax.programs import sample

SHORT = ["--dtype", "float32", "--max_new_tokens", "5"]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    (folder / "hf").mkdir()
    random_hf.write_checkpoint(folder / "hf")
    to_jax.convert(folder / "hf", folder / "ckpt")
    return folder / "ckpt"


def flags_of(ckpt, *others):
    cache = ROOT / ".cache" / "jax"
    return ["--ckpt", ckpt, *SHORT, "--compilation_cache", cache, *others]


def same(text):
    """Parses answers and removes their times."""
    rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A file of seven rows; the third is bad."""
    rows = [{"prompt": f"What is {n}?", "id": n} for n in range(7)]
    rows[2]["images"] = ["absent.png"]
    path = tmp_path_factory.mktemp("questions") / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def answers(ckpt, questions):
    """The answers of one process, as text."""
    target = questions.with_name("one.jsonl")
    flags = flags_of(ckpt, "--batch", questions, "--out", target, "--batch_size", 2)
    assert sample.main([*map(str, flags)]) == 1
    return target.read_text()


def test_one_prompt_on_a_mesh_of_two_processes(ckpt, answers):
    """Both processes have experts; only process 0 prints the answer, and it is the same."""
    flags = flags_of(ckpt, "--prompt", "What is 0?", "--json", "--mesh=expert=4")
    first, second = finish(*start_two("sample.py", 2, *flags))
    assert (first[0], second[0]) == (0, 0), (first, second)
    (found,), (want, *_) = same(first[1]), same(answers)
    assert found.items() <= want.items() and len(found["tokens"]) == 5
    assert "on 4 x cpu (cpu), mesh expert=4" in first[2]
    assert second[1] == "" and "parameters" not in second[2]


@long_test
def test_a_picture_on_a_mesh_of_two_processes(ckpt, capfd):
    """The vision tower and the adaptor are sharded, too; the seed gives the same samples."""
    asked = ["--image", "examples/question.png", "--prompt", "What is it?", "--temperature", "1"]
    asked += ["--seed", "3", "--json", "--chunk_size", "16"]
    assert sample.main([*map(str, flags_of(ckpt, *asked))]) == 0
    want = same(capfd.readouterr().out)
    flags = flags_of(ckpt, *asked, "--mesh=fsdp=2,tensor=2")
    first, second = finish(*start_two("sample.py", 2, *flags))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert same(first[1]) == want and want[0]["image_tokens"] > 20


def test_rows_are_shared_and_put_together(ckpt, questions, answers, tmp_path):
    """Resumes an interrupted run: two rows in OUT, one and a half rows of process 1.

    Each process answers prompts of its own, one at a time.
    """
    lines, target = answers.splitlines(keepends=True), tmp_path / "out.jsonl"
    target.write_text("".join(lines[:2]))
    shard_path(target, (1, 2)).write_text(lines[3] + lines[5][:40])
    flags = flags_of(ckpt, "--batch", questions, "--out", target, "--batch_size", 1)
    first, second = finish(*start_two("sample.py", 1, *flags))
    assert (first[0], second[0]) == (1, 1), (first, second)  # because of the bad row
    assert same(target.read_text()) == same(answers)
    assert target.read_text().startswith("".join(lines[:2])) and lines[3] in target.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert "7 rows, 1 of them with an error" in first[2]
    assert (first[1], second[1]) == ("", "") and "rows" not in second[2]


@long_test
def test_rows_on_a_mesh_of_two_processes(ckpt, questions, answers, tmp_path):
    """All processes answer all rows, and process 0 writes; a complete OUT is not changed."""
    target = tmp_path / "out.jsonl"
    flags = flags_of(ckpt, "--batch", questions, "--out", target, "--batch_size", 2)
    for said in ("answering", "7 of 7 rows are already answered"):
        first, second = finish(*start_two("sample.py", 2, *flags, "--mesh=expert=4"))
        assert (first[0], second[0]) == (1, 1), (first, second)
        assert same(target.read_text()) == same(answers)
        assert said in first[2] and second[1] == ""


@long_test
def test_a_killed_process_ends_all_and_the_run_goes_on(ckpt, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"What is {n}?"}) for n in range(300)))
    flags = flags_of(ckpt, "--batch", source, "--out", target, "--batch_size", 4)
    started, part = start_two("sample.py", 1, *flags), shard_path(target, (1, 2))
    while not (part.exists() and part.stat().st_size):
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)
    started[1].send_signal(signal.SIGKILL)
    first, second = finish(*started)
    assert second[0] == -signal.SIGKILL
    assert_names_lost(first, 1)
    before = part.read_text()
    assert 0 < before.count("\n") < 150
    ended = finish(*start_two("sample.py", 1, *flags))
    assert [code for code, *_ in ended] == [0, 0], ended
    assert [row["row"] for row in same(target.read_text())] == list(range(1, 301))
    assert before.splitlines()[0] in target.read_text()


@pytest.mark.parametrize(
    ("families", "devices", "mesh"),
    [
        ("text", 1, ""),
        pytest.param("colour,digit", 1, "", marks=long_test),
        pytest.param("text,digit", 2, "expert=4", marks=long_test),
    ],
)
def test_scores_are_those_of_one_process(ckpt, tmp_path, families, devices, mesh):
    """Processes share the questions, or answer all together on a mesh; process 0 writes."""
    asked = ["--data", "synthetic", "--questions", 4, "--batch_size", 2, "--families", families]
    flags = flags_of(ckpt, *asked)
    assert program.main([*map(str, flags), "--out", str(tmp_path / "one")]) == 0
    two = tmp_path / "two"
    ended = finish(*start_two("eval.py", devices, *flags, f"--mesh={mesh}", "--out", two))
    assert [code for code, *_ in ended] == [0, 0], ended
    found = [folder / "answers.jsonl" for folder in (tmp_path / "one", two)]
    assert found[1].read_text() == found[0].read_text()
    one, other = (json.loads(path.with_name("scores.json").read_text()) for path in found)
    assert {**other, "seconds": 0} == {**one, "seconds": 0} and one["questions"] >= 4
    assert "exact match" in ended[0][1] and ended[1][1] == ""


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)


def test_the_mesh_tells_who_answers_what(two_processes):
    """Two processes, simulated in one, with eight devices each."""
    shard = choose_shard("expert=4", rows=True)
    assert (shard.index, shard.count, dict(shard.mesh.shape)["data"]) == (1, 2, 2)
    assert not shard.together and choose_shard("", rows=True).mesh is None
    assert choose_shard("expert=4", rows=False).together
    with pytest.raises(
        UserError, match="need a mesh of all their 8 devices; give --mesh, for example expert"
    ):
        choose_shard("", rows=False)
    with pytest.raises(UserError, match="does not fit 8 devices"):  # this process has only 8
        choose_shard("expert=16", rows=True)


def test_parts_are_dealt_out_again(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("0\n")
    for index, text in enumerate(("1\n3\n5\n", "2\n4\n")):
        shard_path(target, (index, 2)).write_text(text)
    with target.open("rb") as out:
        _append_parts(target, out, 2)
    assert target.read_text() == "0\n1\n2\n3\n4\n5\n"
    with pytest.raises(
        UserError, match=r"-of-00002\.jsonl was written by an unfinished run with 2 processes"
    ):
        _refuse_other_parts(target, 3)
    shard_path(target, (1, 2)).unlink()
    with target.open("rb") as out, pytest.raises(UserError, match="process 1 has written it"):
        _append_parts(target, out, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=a:1"], "--coordinator needs --num_processes and --process_id"),
        (["--distributed"], "a chat runs in one process; give --prompt, --messages or"),
    ],
)
def test_flags_that_need_others(capsys, flags, message):
    assert sample.main(["--ckpt=absent", *flags]) == 1
    assert message in capsys.readouterr().err
