"""Tests of reading JSON files that others wrote."""

import json

import pytest

from vl2jax.common.errors import UserError, joined
from vl2jax.common.json_file import read_object


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "line 1, column 2"),
        (b"[]", "expected an object"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        (b'{"a": NaN}', "NaN is not a number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is not a number of JSON"),
        (b'{"a": 1e999}', "the number '1e999' is too large"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is too large"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b'{"a": "\\ud800"}', "unpaired surrogate"),
        (b'{"\\udfff": 1}', "unpaired surrogate"),
        (b'\xff\xfe{\x00"\x00', "not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "larger than 500 bytes"),
    ],
)
def test_what_is_not_an_object(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: ") as error:
        read_object(path, 500 if b"xxx" in content else 10**6)
    message = str(error.value)
    assert words in message
    assert "\n" not in message and len(message) < len(str(path)) + 250


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: not found"):
        read_object(tmp_path / "none.json")
    assert read_object(tmp_path / "none.json", required=False) == {}
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: is not a file"):
        read_object(tmp_path / "folder", required=False)


def test_escapes_and_marks_are_read(tmp_path):
    value = {"a": "\U0001f600 图\\ud800", "b": [1, -2.5, None, True, {}]}
    path = tmp_path / "config.json"
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_object(path) == value


def test_lists_in_messages_are_short():
    assert joined(["a", "b"]) == "a; b"
    assert joined(list("abcdefghij"), most=3) == "a; b; c; and 7 more"
    assert len(joined(["x" * 10**6] * 9)) < 4000
