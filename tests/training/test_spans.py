"""Tests of texts that name steps and batches."""

import pytest

from vl2jax.common.errors import UserError
from vl2jax.training.spans import parse_batches, parse_window


def test_good_ones():
    assert parse_window("") is None and parse_window("10:15") == (10, 15)
    assert parse_batches("") == () and parse_batches("7") == (range(7, 8),)
    assert parse_batches(" 7, 40-42 ,") == (range(7, 8), range(40, 43))


@pytest.mark.parametrize(
    "text", ["10", "10:", ":5", "5:5", "9:3", "1:2:3", "-1:4", "1:²", "a:b", "1:" + "9" * 5000]
)
def test_bad_windows(text):
    with pytest.raises(UserError, match="profile must be START:STOP, like 10:15, got") as error:
        parse_window(text)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["0", "a", "3-", "-3", "5-4", "1-2-3", "²", "1.5", "9" * 5000])
def test_bad_batches(text):
    with pytest.raises(UserError, match="numbers of batches from 1, such as 7,40-42; got") as error:
        parse_batches(f"3,{text}")
    assert len(str(error.value)) < 300


def test_too_many_batches():
    with pytest.raises(UserError, match="more than 10000 batches"):
        parse_batches("1-10001")
