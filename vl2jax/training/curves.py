"""Plots the metrics of a training run."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vl2jax.common import plots
from vl2jax.common.progress import human_count
from vl2jax.training.metrics_file import sample_metrics

# Steps float64[N] and values float64[N, L] of a metric; L is 1, or the number of layers.  Values
# that are not finite are NaN.
Series = tuple[np.ndarray, np.ndarray]

_POINTS = 1000  # maximum number of points of a line; more would not be visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of the figure.

    Attributes:
      title: title of the panel.
      key: name of the metric.
      over: name of the same metric on held-out data, drawn on top; None: none.
      smooth: whether to draw a running mean over the values.
      log: whether to use a logarithmic scale if the values span more than a factor of 20.
    """

    title: str
    key: str
    over: str | None = None
    smooth: bool = True
    log: bool = False


PANELS = (
    Panel(title="Loss", key="train/loss", over="heldout/loss", log=True),
    Panel(title="Token accuracy", key="train/token_acc", over="heldout/token_acc"),
    Panel(title="Learning rate", key="train/lr", smooth=False),
    Panel(title="Gradient norm", key="train/grad_norm"),
    Panel(title="MaxViolation, each MoE layer and their mean", key="moe/max_violation"),
    Panel(title="Tokens per second", key="perf/tokens_per_sec"),
)


def draw_curves(metrics_file: Path | str, out: Path | str) -> list[str]:
    """Draws one panel for each metric of `PANELS` that the metrics file contains.

    Args:
      metrics_file: a metrics.jsonl.
      out: PNG file to write; it is not written if there is nothing to draw.

    Returns:
      Names of the metrics drawn.

    Raises:
      UserError: matplotlib is not installed.
      OSError: a file cannot be read or written.
    """
    series = read_series(metrics_file)
    shown = [panel for panel in PANELS if panel.key in series]
    if shown:
        plot(shown, series).savefig(out, format="png")
    return [panel.key for panel in shown]


def read_series(metrics_file: Path | str) -> dict[str, Series]:
    """Reads the metrics of `PANELS`; of a long file evenly spaced lines, and all evaluations.

    Args:
      metrics_file: a metrics.jsonl.

    Returns:
      The metrics that have a finite value, by name.

    Raises:
      OSError: the metrics file cannot be read.
    """
    keys = {key for panel in PANELS for key in (panel.key, panel.over) if key}
    found: dict[str, list] = {key: [] for key in keys}
    marks = [f'"{panel.over}"'.encode() for panel in PANELS if panel.over]
    for line in sample_metrics(metrics_file, marks):
        for key in keys & line.keys():
            values = line[key] if isinstance(line[key], list) else [line[key]]
            found[key].append((line["step"], values))
    series = {}
    for key, points in found.items():
        width = max((len(values) for _, values in points), default=0)
        rows = [[*values, *[None] * (width - len(values))] for _, values in points]
        values = np.array(rows, np.float64)  # None becomes NaN
        if np.isfinite(values).any():
            series[key] = np.array([step for step, _ in points], np.float64), values
    return series


def plot(shown: Sequence[Panel], series: Mapping[str, Series]):
    """Draws panels that share the scale of the steps.

    Args:
      shown: the panels, at least one.
      series: values of their metrics, by name.

    Returns:
      A `matplotlib.figure.Figure`.
    """
    columns = min(3, len(shown)) if len(shown) != 4 else 2
    figure, places = plots.make_panels(len(shown), columns)
    from matplotlib import ticker

    last = max(steps[-1] for steps, _ in series.values())
    for place, (panel, axes) in enumerate(zip(shown, places, strict=True)):
        lowest = place + columns >= len(shown)  # the lowest panel of its column
        plots.style_axes(axes, panel.title, "step" if lowest else "")
        _draw_panel(axes, panel, series)
        axes.set_xlim(0, 1.01 * max(last, 1))
        axes.xaxis.set_major_locator(
            ticker.MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10])
        )
        axes.xaxis.set_major_formatter(lambda step, _: human_count(step, 6))
    return figure


def _draw_panel(axes, panel: Panel, series: Mapping[str, Series]) -> None:
    """Draws the lines, the scale and the legend of a panel."""
    steps, values = series[panel.key]
    mean, layers = _mean(values), values.shape[1]
    clear, faint = [mean], []
    if panel.smooth:
        clear = [_smooth(mean)]
        # Without smoothing, the lines of many layers could not be told apart.
        faint = [_smooth(layer) for layer in values.T] if layers > 1 else [mean]
    for place, line in enumerate(faint):
        axes.plot(*_thin(steps, line), color=_tint(place, layers), linewidth=0.8)
    over = series.get(panel.over or "")
    _draw_line(axes, steps, clear[0], plots.BLUE, "training  " if over else "")
    if over:
        steps, values = over
        clear.append(_mean(values))
        _draw_line(axes, steps, clear[1], plots.ORANGE, "held out  ", marker="o")
    _set_scale(axes, clear if layers == 1 else [*clear, *faint], faint, panel.log)
    place = dict(loc="lower right", bbox_to_anchor=(1, 1.03), ncols=2)
    plots.add_legend(axes, **place, labelcolor="linecolor", handlelength=1.2 * bool(over))


def _draw_line(
    axes, steps: np.ndarray, values: np.ndarray, colour: str, name: str, marker: str | None = None
) -> None:
    """Draws a main line of a panel, with its last value in the legend."""
    steps, values = _thin(steps, values)
    last = _number(values[-1], exponent=abs(values[-1]) < 0.001)
    marker = "o" if len(values) == 1 else marker
    every = None if len(values) <= 60 else [-1]
    dots = dict(marker=marker, markersize=4.5, markevery=every, clip_on=marker is None)
    axes.plot(steps, values, color=colour, linewidth=1.8, label=name + last, zorder=3, **dots)


def _set_scale(axes, clear: Sequence[np.ndarray], faint: Sequence[np.ndarray], log: bool) -> None:
    """Sets limits and ticks so that all main lines are visible; ignores outliers of faint lines."""
    from matplotlib import ticker

    shown, every = np.concatenate(clear), np.concatenate([*clear, *faint])
    low = min(np.nanmin(shown), np.nanquantile(every, 0.01))
    high = max(np.nanmax(shown), np.nanquantile(every, 0.99))
    if log and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        subs = (1, 2, 5) if high < 500 * low else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        if 0 <= low < 0.6 * high:
            low = 0.0
        if high - low < 1e-9 * max(abs(high), 1e-30):  # all values are equal
            low, high = min(0.0, low), max(0.0, high) or 1.0
        room = 0.05 * (high - low)
        axes.set_ylim(low - room * (low != 0), high + room)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    small = axes.get_ylim()[1] < 0.01
    axes.yaxis.set_major_formatter(lambda value, _: _number(value, 6, exponent=small))


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values over layers; NaN if there are none."""
    some = np.isfinite(values)
    total = np.where(some, values, 0).sum(1)
    return np.where(some.any(1), total / np.maximum(some.sum(1), 1), np.nan)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential running mean over 1% of the points, bias-corrected; NaN stays NaN."""
    keep = 1 - 1 / max(3.0, len(values) / 100)
    out, total, weight = np.full(len(values), np.nan), 0.0, 0.0
    for i, value in enumerate(values):
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            out[i] = total / weight
    return out


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Removes NaN and keeps the minimum and maximum of each interval, so that spikes remain."""
    good = np.isfinite(values)
    steps, values = steps[good], values[good]
    if len(steps) > _POINTS:
        parts = np.array_split(np.arange(len(steps)), _POINTS // 2)
        ends = [part[[values[part].argmin(), values[part].argmax()]] for part in parts]
        kept = np.unique(np.concatenate([*ends, [len(steps) - 1]]))
        steps, values = steps[kept], values[kept]
    return steps, values


def _tint(place: int, count: int) -> tuple[float, ...]:
    """A faint colour: light blue for a single line, otherwise between light violet and teal."""
    if count == 1:
        return 0.75, 0.82, 0.99
    violet, teal = np.array([0.78, 0.71, 0.98]), np.array([0.51, 0.84, 0.77])
    return tuple(violet + (teal - violet) * place / (count - 1))


def _number(value: float, digits: int = 3, *, exponent: bool) -> str:
    """Formats a number for reading: `0.123`, `12.3k`, or `3e-4`."""
    if value == 0 or not exponent:
        return human_count(value, digits)
    head, power = f"{value:.2e}".split("e")
    return f"{head.rstrip('0').rstrip('.')}e{int(power)}"
