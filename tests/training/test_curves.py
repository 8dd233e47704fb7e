"""Curves: what is drawn where, ticks, and metrics files that are not as they should be."""

import json

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError
from vl2jax.training.curves import (
    BLUE,
    ORANGE,
    PANEL,
    Scale,
    draw_curves,
    nice_step,
    read_metrics,
    tick_labels,
)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def near(image: np.ndarray, colour) -> np.ndarray:
    """Where an image has a colour: bool[H, W]."""
    return (np.abs(image.astype(int) - colour) < 30).all(-1)


def panel(path, place: int, columns: int = 3) -> np.ndarray:
    """One panel without its title line."""
    image = np.asarray(PIL.Image.open(path))
    row, column = divmod(place, columns)
    (width, height) = PANEL
    return image[row * height + 40 : (row + 1) * height, column * width : (column + 1) * width]


def test_all_panels(tmp_path):
    lines = [
        {
            "step": step,
            "train/loss": 5.0 / step,
            "train/token_acc": 1 - 1 / step,
            "train/lr": 1e-3,
            "train/grad_norm": 1.0 + step % 3,
            "moe/max_violation": [1.0 / step, 2.0 / step],
            "perf/tokens_per_sec": None if step == 1 else 12e3,
        }
        | ({"heldout/loss": 4.0 / step} if step % 20 == 0 else {})
        for step in range(1, 101)
    ]
    out = tmp_path / "curves.png"
    assert len(draw_curves(write(tmp_path / "metrics.jsonl", lines), out)) == 6
    with PIL.Image.open(out) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (1680, 760))
    for place in range(6):
        assert near(panel(out, place), BLUE).sum() > 200, place
    assert near(panel(out, 0), ORANGE).sum() > 100
    assert not near(panel(out, 1), ORANGE).any()


def test_a_falling_line_falls(tmp_path):
    lines = [{"step": step, "train/lr": 1.0 - step / 100} for step in range(101)]
    out = tmp_path / "curves.png"
    assert draw_curves(write(tmp_path / "m.jsonl", lines), out) == ["train/lr"]
    with PIL.Image.open(out) as image:
        assert image.size == PANEL
    rows, columns = np.nonzero(near(panel(out, 0, 1), BLUE))
    assert rows[columns < np.quantile(columns, 0.1)].max() < np.quantile(rows, 0.2)
    assert np.corrcoef(rows, columns)[0, 1] > 0.99
    assert columns.min() < 90 and columns.max() > 520 and np.ptp(rows) > 250


def test_nothing_to_draw(tmp_path):
    lines = [{"step": 1, "train/loss": None, "other": 1.0}]
    assert draw_curves(write(tmp_path / "m.jsonl", lines), tmp_path / "c.png") == []
    assert not (tmp_path / "c.png").exists()


def test_a_single_point_and_layers_that_fail(tmp_path):
    lines = [{"step": 7, "train/loss": 0.0, "moe/max_violation": [None, 1.0]}]
    out = tmp_path / "c.png"
    assert draw_curves(write(tmp_path / "m.jsonl", lines), out) == [
        "train/loss",
        "moe/max_violation",
    ]
    assert near(panel(out, 0, 2), BLUE).sum() > 10
    assert near(panel(out, 1, 2), BLUE).sum() > 10


def test_long_runs_are_thinned_but_spikes_stay(tmp_path):
    lines = [{"step": i, "train/lr": 1.0 + 9.0 * (i == 4321)} for i in range(20_000)]
    out = tmp_path / "c.png"
    draw_curves(write(tmp_path / "m.jsonl", lines), out)
    rows, _ = np.nonzero(near(panel(out, 0, 1), (37, 99, 235)))
    assert np.ptp(rows) > 200


@pytest.mark.parametrize(
    ("span", "step"), [(1.0, 0.2), (6.0, 1.0), (2000.0, 500.0), (0.07, 0.02), (100.0, 20.0)]
)
def test_nice_steps(span, step):
    assert nice_step(span) == pytest.approx(step)


def test_scales():
    scale = Scale(0.13, 1.9)
    assert scale.ticks == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert scale(1.0) == 0.5
    assert Scale(0.13, 1.9, room=0.25)(2.0) == 0.8
    log = Scale(0.1, 5.0, log=True)
    assert log.ticks == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert log(1.0) - log(0.1) == pytest.approx(log(5.0) - log(0.5))


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 0.25, 0.5], ["0", "0.25", "0.50"]),
        ([0, 10_000, 20_000], ["0", "10k", "20k"]),
        ([11_500, 12_000], ["11.5k", "12.0k"]),
        ([0, 1e-4, 1.5e-4], ["0", "1e-4", "1.5e-4"]),
        ([-1, 0, 1], ["-1", "0", "1"]),
    ],
)
def test_tick_labels(ticks, labels):
    assert tick_labels(ticks) == labels


def test_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": [1.5, null]}\n{"step": 2, "a": nu')
    assert read_metrics(path) == [{"step": 1, "a": [1.5, None]}]
    path.write_text('{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is no line of metrics"):
        read_metrics(path)
