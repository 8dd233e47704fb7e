"""Plots of a run: lines, scales and labels."""

import json

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.plots import BLUE, DPI, ORANGE, PANEL
from vl2jax.training.curves import PANELS, draw_curves, plot, read_series

SIZE = round(PANEL[0] * DPI), round(PANEL[1] * DPI)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def panels(tmp_path):
    """`panels(lines)`: the axes drawn for a metrics file with these lines, by metric."""

    def make(lines):
        series = read_series(write(tmp_path / "metrics.jsonl", lines))
        shown = [panel for panel in PANELS if panel.key in series]
        figure = plot(shown, series)
        figure.draw_without_rendering()
        return dict(zip((panel.key for panel in shown), figure.axes, strict=True))

    return make


def of_colour(axes, colour):
    return [line for line in axes.lines if line.get_color() == colour]


def blue_pixels(path) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels that have the colour of the lines, without the titles."""
    image = np.asarray(PIL.Image.open(path).convert("RGB")).astype(int)
    found = (np.abs(image - [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]) < 30).all(-1)
    found[: SIZE[1] // 10] = False
    return np.nonzero(found)


def written(axes) -> list[str]:
    """Tick labels of the vertical axis that are within its limits."""
    low, high = axes.get_ylim()
    labels = axes.get_yticklabels()
    return [label.get_text() for label in labels if low <= label.get_position()[1] <= high]


def test_all_panels(tmp_path, panels):
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
        assert (image.format, image.size) == ("PNG", (3 * SIZE[0], 2 * SIZE[1]))
    drawn = panels(lines)
    assert [axes.get_title(loc="left") for axes in drawn.values()] == [p.title for p in PANELS]
    assert [axes.get_xlabel() for axes in drawn.values()] == [""] * 3 + ["step"] * 3
    for key, axes in drawn.items():
        assert len(of_colour(axes, BLUE)) == 1, key
        assert len(of_colour(axes, ORANGE)) == (key == "train/loss"), key
        assert axes.get_xlim() == (0, 101)
    faint = [len(axes.lines) - 1 for axes in drawn.values()]
    assert faint == [1 + 1, 1, 0, 1, 2, 1]  # the loss also has a held-out line
    (held_out,) = of_colour(drawn["train/loss"], ORANGE)
    np.testing.assert_allclose(held_out.get_xydata()[0], (20, 0.2))
    assert held_out.get_marker() == "o"
    said = [text.get_text() for text in drawn["train/loss"].get_legend().get_texts()]
    assert said == ["training  0.0511", "held out  0.04"]
    (rate,) = drawn["train/lr"].get_legend().get_texts()
    assert (rate.get_text(), rate.get_color()) == ("0.001", BLUE)


def test_smoothing_starts_at_the_first_value_and_skips_what_is_not_finite(panels):
    lines = [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": None}]
    lines.append({"step": 3, "train/loss": 4.0})
    axes = panels(lines)["train/loss"]
    raw, (smooth,) = axes.lines[0], of_colour(axes, BLUE)
    np.testing.assert_allclose(raw.get_xydata(), [(1, 2), (3, 4)])
    np.testing.assert_allclose(smooth.get_xydata(), [(1, 2), (3, 3.2)])  # (2 * 2/3 + 4) / (1 + 2/3)


def test_a_falling_line_falls(tmp_path):
    lines = [{"step": step, "train/lr": 1.0 - step / 100} for step in range(101)]
    out = tmp_path / "curves.png"
    assert draw_curves(write(tmp_path / "m.jsonl", lines), out) == ["train/lr"]
    with PIL.Image.open(out) as image:
        assert image.size == SIZE
    rows, columns = blue_pixels(out)
    assert rows[columns < np.quantile(columns, 0.1)].max() < np.quantile(rows, 0.2)
    assert np.corrcoef(rows, columns)[0, 1] > 0.99
    width, height = SIZE
    assert columns.min() < 0.16 * width and columns.max() > 0.92 * width
    assert np.ptp(rows) > 0.65 * height


def test_nothing_to_draw(tmp_path):
    lines = [{"step": 1, "train/loss": None, "other": 1.0}]
    assert draw_curves(write(tmp_path / "m.jsonl", lines), tmp_path / "c.png") == []
    assert not (tmp_path / "c.png").exists()


def test_a_single_point_and_layers_that_fail(panels):
    drawn = panels([{"step": 7, "train/loss": 0.0, "moe/max_violation": [None, 1.0]}])
    assert list(drawn) == ["train/loss", "moe/max_violation"]
    for axes, value in zip(drawn.values(), (0.0, 1.0), strict=True):
        (point,) = of_colour(axes, BLUE)
        assert point.get_xydata().tolist() == [[7, value]] and point.get_marker() == "o"
        low, high = axes.get_ylim()
        assert low <= value <= high


def test_long_runs_are_thinned_but_spikes_stay(tmp_path, panels):
    lines = [{"step": i, "train/lr": 1.0 + 9.0 * (i == 4321)} for i in range(20_000)]
    (line,) = panels(lines)["train/lr"].lines
    points = line.get_xydata()
    assert len(points) <= 1001 and [4321, 10] in points.tolist()
    assert points[-1].tolist() == [19_999, 1]
    out = tmp_path / "c.png"
    draw_curves(tmp_path / "metrics.jsonl", out)
    assert np.ptp(blue_pixels(out)[0]) > 0.5 * SIZE[1]


def test_outliers_do_not_stretch_the_scale(panels):
    lines = [{"step": i, "train/grad_norm": 1.0 + 99 * (i == 50)} for i in range(1000)]
    low, high = panels(lines)["train/grad_norm"].get_ylim()
    assert low == 0 and 10 < high < 15  # the smoothed line reaches 10.9


def test_a_layer_apart_is_seen(panels):
    lines = [{"step": i, "moe/max_violation": [1.0] * 200 + [50.0]} for i in range(1, 4)]
    assert panels(lines)["moe/max_violation"].get_ylim()[1] > 50


@pytest.mark.parametrize(
    ("values", "scale", "labels"),
    [
        ((0.1, 5.0), "log", ["0.1", "0.2", "0.5", "1", "2", "5"]),
        ((1e-3, 9.0), "log", ["0.001", "0.01", "0.1", "1", "10"]),
        ((1.0, 19.0), "linear", ["0", "5", "10", "15"]),
        ((0.7, 0.95), "linear", ["0.7", "0.75", "0.8", "0.85", "0.9", "0.95"]),
    ],
)
def test_scales_of_the_loss(panels, values, scale, labels):
    lines = [{"step": i, "train/loss": value} for i, value in enumerate(values, start=1)]
    lines += [
        {"step": 3, "heldout/loss": value} for value in values
    ]  # held-out values are not smoothed
    axes = panels(lines)["train/loss"]
    assert axes.get_yscale() == scale
    assert written(axes) == labels


@pytest.mark.parametrize(
    ("key", "top", "labels"),
    [
        ("train/lr", 3e-4, ["0", "1e-4", "2e-4", "3e-4"]),
        ("train/lr", 1.5e-4, ["0", "5e-5", "1e-4", "1.5e-4"]),
        ("train/lr", 0.6, ["0", "0.2", "0.4", "0.6"]),
        ("perf/tokens_per_sec", 12e3, ["0", "2.5k", "5k", "7.5k", "10k"]),
    ],
)
def test_numbers(panels, key, top, labels):
    axes = panels([{"step": 10_000 * i, key: top * i / 2} for i in range(3)])[key]
    assert written(axes) == labels
    steps = [label.get_text() for label in axes.get_xticklabels()]
    assert steps[:2] == ["0", "5k"]
