"""Metrics files: incomplete and malformed lines, truncation when a run resumes."""

import json
import random

import numpy as np
import pytest

from vl2jax.common.errors import UserError
from vl2jax.training import metrics_file
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
    assert drop_after(path, 3) is None and not path.exists()
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole)
    inode = path.stat().st_ino
    assert drop_after(path, 2) is None and path.read_bytes() == whole
    path.write_bytes(whole[:-1])  # only the newline is missing
    assert drop_after(path, 2) is None and path.read_bytes() == whole
    path.write_bytes(whole + b'\x00\x00\n{"step": 3, "a": nu')  # killed
    assert drop_after(path, 2) is None and path.read_bytes() == whole
    path.write_bytes(whole + b'{"step": 3}\n{"step": 4}\n{"st')
    assert drop_after(path, 2) == 4 and path.read_bytes() == whole
    assert drop_after(path, 0) == 2 and path.read_bytes() == b""
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("seed", range(3))
def test_dropping_finds_the_place_wherever_it_is(tmp_path, monkeypatch, seed):
    """Long and short lines, several of a step, gaps between steps, malformed lines."""
    monkeypatch.setattr(metrics_file, "_TAIL", 64)
    dice = random.Random(seed)
    steps = sorted(dice.choices(range(1, 300), k=200))
    lines = [json.dumps({"step": step, "a": "x" * dice.choice((0, 9, 200))}) for step in steps]
    path = tmp_path / "m.jsonl"
    for step in dice.sample(range(1, 301), 40):
        kept = [line for line, number in zip(lines, steps, strict=True) if number <= step]
        after = [dice.choice((line, line, "\0\0")) for line in lines[len(kept) :]]
        path.write_text("".join(line + "\n" for line in [*kept, *after]))
        drop_after(path, step)
        assert path.read_text() == "".join(line + "\n" for line in kept), step


def test_dropping_reads_little(tmp_path, monkeypatch):
    """Of 20,000 lines, those that bisection looks at, and the last ones."""
    monkeypatch.setattr(metrics_file, "_TAIL", 4096)
    parsed, parse = [], metrics_file.parse_line
    monkeypatch.setattr(metrics_file, "parse_line", lambda text: parsed.append(1) or parse(text))
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"step": {n}, "a": {"1" * 80}}}\n' for n in range(1, 20_001)))
    assert drop_after(path, 19_000) == 20_000
    assert len(parsed) < 200
    assert [line["step"] for line in read_metrics(path)][-1] == 19_000


def test_a_long_file_is_sampled_evenly_with_all_that_is_marked(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_file, "_READ_WHOLE", 20_000)
    monkeypatch.setattr(metrics_file, "_TAIL", 1000)
    path = tmp_path / "m.jsonl"
    lines = [f'{{"step": {n}, "a": {"1" * 80}}}\n' for n in range(1, 10_001)]
    for n in range(500, 10_001, 500):
        lines[n - 1] += f'{{"step": {n}, "heldout/loss": 1.5}}\n'
    lines[77] += "\0\0\n"
    path.write_text("".join(lines) + '{"step": 10001, "a": 1')
    found = list(metrics_file.sample_metrics(path, [b'"heldout/loss"']))
    marked = [line["step"] for line in found if "heldout/loss" in line]
    assert marked == list(range(500, 10_001, 500))
    steps = [line["step"] for line in found if "a" in line]
    assert 150 < len(steps) < 250 and steps == sorted(set(steps))
    assert steps[0] == 1 and max(np.diff(steps)) < 100 and steps[-1] > 9900
    monkeypatch.setattr(metrics_file, "_MARKED", 3)
    found = list(metrics_file.sample_metrics(path, [b'"heldout/loss"']))
    marked = [line["step"] for line in found if "heldout/loss" in line]
    assert 3 <= len(marked) < 6 and marked[-1] == 10_000
    monkeypatch.setattr(metrics_file, "_READ_WHOLE", 10**9)
    assert len(list(metrics_file.sample_metrics(path, []))) == 10_020
