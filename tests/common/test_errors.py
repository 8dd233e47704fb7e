"""Messages bound the values that they print, and stay on one line."""

import pytest

from vl2jax.common.errors import clip, named, reason, shown


@pytest.mark.parametrize(
    "value",
    [
        "A" * 10**6,
        ["A" * 10**6] * 1000,
        {f"key {n}": {"bytes": "A" * 10**5} for n in range(1000)},
        b"\xff" * 10**6,
        10**5000,
        [[[[[[["deep"]]]]]]],
        "two\nlines\x1b[31m and \ud83d half of a pair",
        PermissionError(13, "not allowed", "a" * 5000),
        None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_short_and_on_one_line(value):
    text = shown(value)
    assert 0 < len(text) <= 80 and text.isprintable()


def test_texts_lose_their_middle():
    assert clip("short.png") == "short.png"
    assert clip("a\nb") == "a b"
    path = "/folder/" + "x" * 5000 + "/end.png"
    assert len(clip(path)) == 200
    assert clip(path).startswith("/folder/x") and clip(path).endswith("/end.png")
    assert "(5016 characters)" in clip(path)


def test_names_are_counted():
    assert named({"b": 1, "a": 2}) == "['a', 'b']"
    assert named(range(1000)).endswith("... (992 more)]")
    assert len(named("k" * 10**6 for _ in range(20))) < 500


def test_reasons_of_other_libraries():
    assert reason(FileNotFoundError(2, "No such file", "/long/path")) == "No such file"
    assert reason(KeyError()) == "KeyError"
    assert reason(RuntimeError("first\n  second " + "x" * 10**6)).startswith("first second xx")
    assert len(reason(RuntimeError("x" * 10**6))) == 160
