"""Every path of a user passes one function, before anything is read or written."""

import importlib.util
import os
from pathlib import Path

import pytest

from vl2jax.common.errors import UserError
from vl2jax.common.paths import is_remote, local_path, path_flag, user_path

ODD = ("a#b", "a?b", "50%20 off", "a|b", "back\\slash", "[1]", "two words", "目录", "x=1,y")


@pytest.mark.parametrize("name", [*ODD, "~tmp.png", "C:\\x", "a:b", "."])
def test_a_name_stays_as_it_is(name):
    assert user_path(name, "x") == Path(name)
    assert user_path(Path(name), "x") == Path(name)


@pytest.mark.parametrize("name", ODD)
def test_a_file_url_is_a_local_path(name, tmp_path):
    path = tmp_path / name
    for url in (path.as_uri(), path.as_uri().replace("file://", "file:"), f"file://{tmp_path}/a"):
        assert user_path(url, "x") == (path if url != f"file://{tmp_path}/a" else tmp_path / "a")
    assert user_path(f"file://localhost{path.as_uri()[7:]}", "x") == path


def test_home_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~", "x") == tmp_path
    assert user_path("~/runs/a", "x") == tmp_path / "runs/a"
    assert user_path("./~/a", "x") == Path("./~/a")
    with pytest.raises(UserError, match=r"^x ~nobody_here/a: there is no such home directory$"):
        user_path("~nobody_here/a", "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "--out is empty; expected a path"),
        ("  ", "--out is empty"),
        (None, "--out must be a path, got None"),
        (3, "--out must be a path, got 3"),
        (b"a", "--out must be a path, got b'a'"),
        ("a\0b", "--out 'a\\x00b' has a null character"),
        (
            "hdfs://x/y",
            "--out hdfs://x/y: hdfs:// is not supported; expected a local path, gs:// or",
        ),
        ("https://x/y", "https:// is not supported"),
        ("gs:/bucket/x", "expected gs://BUCKET/PATH"),
        ("gs:///x", "expected gs://BUCKET/PATH"),
        ("s3://", "expected s3://BUCKET/PATH"),
        ("file://host/x", "expected file:///PATH, a path on this host"),
        ("file:///a%00b", "expected file:///PATH"),
    ],
)
def test_what_is_no_path(value, message):
    with pytest.raises(UserError) as caught:
        user_path(value, "--out")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_messages_are_short():
    with pytest.raises(UserError) as caught:
        user_path("abc://" + "x" * 5000, "x")
    assert len(str(caught.value)) < 400


def test_object_stores(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for text in ("gs://bucket/a b/#1", "s3://bucket"):
        path = user_path(text, "x")
        assert os.fspath(path) == text
        assert is_remote(path) and is_remote(text)
        with pytest.raises(UserError, match="expected a local path, not one on an object store"):
            local_path(text, "x")
    assert not is_remote("gs") and not is_remote(Path("/gs/x")) and not is_remote("file:///x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs gcsfs, .* pip install "vl2jax\[gcs\]"'):
        user_path("gs://bucket/x", "x")


def test_flags():
    assert path_flag()("a") == Path("a")
    assert path_flag(off=True)("off") == "off"
    assert path_flag()("off") == Path("off")
