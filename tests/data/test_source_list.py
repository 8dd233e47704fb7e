"""The list of sources in a configuration, and paths with unusual characters."""

import json

import pytest

from vl2jax.common.errors import UserError
from vl2jax.data.files import open_source
from vl2jax.data.source_list import read_sources

ROW = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


def write(path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([ROW]))
    return str(path)


def test_paths_and_weights():
    assert read_sources("synthetic", "data.train") == [("synthetic", 1.0)]
    assert read_sources("a.jsonl=0.7, b=c.json=3", "x") == [("a.jsonl", 0.7), ("b=c.json", 3.0)]
    assert read_sources("split=train/p.json", "x") == [("split=train/p.json", 1.0)]
    assert read_sources("split=train/p.json=2,", "x") == [("split=train/p.json", 2.0)]


def test_what_is_no_list_of_sources():
    for wrong in ("a.json=0", "a.json=-1", "a.json=nan", "a.json=inf"):
        with pytest.raises(UserError, match="weight above 0"):
            read_sources(wrong, "data.train")
    with pytest.raises(UserError, match=r"data\.train has no source"):
        read_sources(" , ", "data.train")
    with pytest.raises(UserError, match=r"data\.train hdfs://x: hdfs:// is not supported"):
        read_sources("a.json,hdfs://x", "data.train")


def test_commas_and_numbers_in_paths_that_exist(tmp_path):
    both = write(tmp_path / "a,b.json")
    assert read_sources(both, "x") == [(both, 1.0)]
    assert read_sources(f"{both}=0.3,c.json=0.7", "x") == [(both, 0.3), ("c.json", 0.7)]
    assert read_sources(f"c.json , {both}", "x") == [("c.json", 1.0), (both, 1.0)]
    assert read_sources(f"{tmp_path}/*,b.json,x", "x") == [
        (f"{tmp_path}/*,b.json", 1.0),
        ("x", 1.0),
    ]
    number = write(tmp_path / "lr=1" / "p.json").removesuffix("/p.json")
    assert read_sources(number, "x") == [(number, 1.0)]
    assert read_sources(f"{number}=2", "x") == [(number, 2.0)]


def test_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = write(tmp_path / "a,b.json")
    assert read_sources("~/a,b.json=2", "x") == [(home, 2.0)]
    assert len(open_source("~/a,b.json")) == 1


@pytest.mark.parametrize(
    "name", ["a#b", "a?b", "50%20", "a|b", "back\\slash", "[1]", "a b", "目录"]
)
def test_folders_with_unusual_names(name, tmp_path):
    path = write(tmp_path / name / f"{name}.json")
    for form in (path, tmp_path / name, f"{tmp_path / name}/*.json", (tmp_path / name).as_uri()):
        assert open_source(form)[0].where == f"{path} row 1"


def test_hidden_files_are_passed_over(tmp_path):
    path = write(tmp_path / "a.json")
    (tmp_path / "._a.json").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".hidden.jsonl").write_text("{")
    for form in (tmp_path, f"{tmp_path}/*.json", f"{tmp_path}/**/*.json*"):
        assert [row.where for row in [open_source(form)[0]]] == [f"{path} row 1"]
        assert len(open_source(form)) == 1
