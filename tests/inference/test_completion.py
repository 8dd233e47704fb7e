"""Streamed text: stop strings, end tokens and incomplete characters."""

from vl2jax.inference.completion import Completion


class Bytes:
    """A tokenizer whose tokens are bytes."""

    cleans_up = False

    def decode(self, ids, *, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", errors="replace")


def _run(text: str, size: int, stop=(), eos=(), limit=1000):
    answer = Completion(Bytes(), eos, stop, limit)
    ids = list(text.encode())
    shown = [answer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return answer, shown


def test_never_half_a_character():
    for size in (1, 2, 3, 5):
        answer, shown = _run("aé狗😀b", size, limit=len("aé狗😀b".encode()))
        assert "".join(shown) == "aé狗😀b"
        assert all("�" not in piece for piece in shown)
        assert answer.finish_reason == "length"


def test_a_stop_string_is_never_shown():
    for size in (1, 2, 3, 7, 50):
        answer, shown = _run("one two END three", size, stop=["END", "zzz"])
        assert "".join(shown) == "one two " == answer.text
        assert answer.finish_reason == "stop"
        assert bytes(answer.tokens).decode() == "one two END"


def test_partial_stop_string_is_shown():
    answer, shown = _run("a EN b EN", 1, stop=["END"], limit=9)
    assert "".join(shown) == "a EN b EN"
    assert shown[2] == shown[3] == ""  # held back while it could be a stop string
    assert answer.finish_reason == "length"


def test_the_earliest_stop_string_wins():
    answer, _ = _run("abcdef", 6, stop=["ef", "cd"])
    assert answer.text == "ab"


def test_end_token():
    answer, shown = _run("ab\x00cd", 3, eos=[0])
    assert (answer.text, shown, answer.finish_reason) == ("ab", ["ab", ""], "stop")
    assert answer.tokens == [97, 98, 0]


def test_without_a_tokenizer():
    answer = Completion(None, [7], [], 3)
    assert answer.push([1, 2, 3, 4]) == ""
    assert (answer.tokens, answer.text, answer.finish_reason) == ([1, 2, 3], None, "length")
