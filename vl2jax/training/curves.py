"""The curves of a training run, drawn from its metrics file with Pillow alone."""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from vl2jax.common.errors import UserError
from vl2jax.common.progress import human_count

Metrics = dict[str, float | list[float | None] | None]

PANEL = 560, 380  # pixels of one panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 22, 48, 52  # around the plot in a panel
_PLOT = PANEL[0] - _LEFT - _RIGHT, PANEL[1] - _TOP - _BOTTOM
_FINE = 3  # lines are drawn so many times larger, then shrunk: smooth edges
_POINTS = 2 * _PLOT[0]  # of a line; more would not be seen
_INK, _SOFT, _GRID, _PAPER = (38, 42, 51), (107, 114, 128), (229, 231, 235), (255, 255, 255)
BLUE, ORANGE = (37, 99, 235), (234, 88, 12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """What one panel shows: a metric and, over it, the same on held-out data."""

    title: str
    key: str
    over: str | None = None
    smooth: bool = True
    log: bool = False  # a logarithmic scale where values span more than a factor of 20


PANELS = (
    Panel(title="Loss", key="train/loss", over="heldout/loss", log=True),
    Panel(title="Token accuracy", key="train/token_acc", over="heldout/token_acc"),
    Panel(title="Learning rate", key="train/lr", smooth=False),
    Panel(title="Gradient norm", key="train/grad_norm"),
    Panel(title="MaxViolation, each MoE layer and their mean", key="moe/max_violation"),
    Panel(title="Tokens per second", key="perf/tokens_per_sec"),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a panel: float64[N] steps and values, all finite."""

    steps: np.ndarray
    values: np.ndarray
    colour: tuple[int, int, int]
    width: float = 2.0
    name: str = ""  # in the legend
    dots: bool = False


def parse_line(text: str | bytes) -> Metrics | None:
    """Reads one line of a metrics file; None where it is torn or no such line."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def read_metrics(path: Path | str) -> list[Metrics]:
    """Reads what a run wrote of itself.

    Args:
      path: a metrics.jsonl; a last line that a killed run left torn is passed over.

    Returns:
      A dict per line: `step`, and by name a value, or a list with one per layer; None stands for
      what was not finite.

    Raises:
      UserError: another line is broken.
      OSError: the file cannot be read.
    """
    return list(_lines(Path(path)))


def draw_curves(metrics_file: Path | str, out: Path | str) -> list[str]:
    """Draws the curves of a run: a panel for each metric of `PANELS` that was written.

    Args:
      metrics_file: a metrics.jsonl.
      out: the PNG to write; not written where there is nothing to draw.

    Returns:
      The metrics drawn.

    Raises:
      UserError: the file is broken.
      OSError: a file cannot be read or written.
    """
    series = _series(Path(metrics_file))
    shown = [(panel, lines) for panel in PANELS if (lines := _panel_lines(panel, series))]
    if not shown:
        return []
    last = max(line.steps[-1] for _, lines in shown for line in lines)
    columns = min(3, len(shown)) if len(shown) != 4 else 2
    rows = math.ceil(len(shown) / columns)
    figure = PIL.Image.new("RGB", (columns * PANEL[0], rows * PANEL[1]), _PAPER)
    for place, (panel, lines) in enumerate(shown):
        row, column = divmod(place, columns)
        figure.paste(_draw_panel(panel, lines, last), (column * PANEL[0], row * PANEL[1]))
    figure.save(out, format="PNG", optimize=True)
    return [panel.key for panel, _ in shown]


def _lines(path: Path) -> Iterator[Metrics]:
    """The lines of a metrics file, one by one."""
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if (line := parse_line(text)) is not None:
                yield line
            elif text.endswith(b"\n"):
                raise UserError(
                    f"{path}:{number} is no line of metrics, a JSON object with a step; remove it"
                )


def _series(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The metrics that panels show: key -> float64[N] steps, float64[N, L] values."""
    keys = {key for panel in PANELS for key in (panel.key, panel.over) if key}
    found: dict[str, list] = {key: [] for key in keys}
    for line in _lines(path):
        for key in keys & line.keys():
            values = line[key] if isinstance(line[key], list) else [line[key]]
            found[key].append((line["step"], values))
    series = {}
    for key, points in found.items():
        width = max((len(values) for _, values in points), default=0)
        if width:
            rows = [list(values) + [None] * (width - len(values)) for _, values in points]
            steps = np.array([step for step, _ in points], np.float64)
            series[key] = steps, np.array(rows, np.float64)  # None becomes NaN
    return series


def _panel_lines(panel: Panel, series) -> list[Line]:
    """The lines of a panel, the faint ones first; none where nothing finite was written."""
    if panel.key not in series:
        return []
    steps, values = series[panel.key]
    layers = values.shape[1]
    lines = [Line(steps, values[:, i], _tint(i, layers), 1.0) for i in range(layers)]
    if layers > 1:
        some = np.isfinite(values)
        total = np.where(some, values, 0).sum(1)
        mean = np.where(some.any(1), total / np.maximum(some.sum(1), 1), np.nan)
        lines.append(Line(steps, _smooth(mean), BLUE))
    elif panel.smooth:
        lines.append(Line(steps, _smooth(values[:, 0]), BLUE, name="training, smoothed"))
    else:
        lines = [Line(steps, values[:, 0], BLUE)]
    if panel.over in series:
        steps, values = series[panel.over]
        lines.append(Line(steps, values[:, 0], ORANGE, name="held out", dots=True))
    return [line for raw in lines if len((line := _finite(raw)).steps)]


def _tint(place: int, count: int) -> tuple[int, int, int]:
    """A faint colour: light blue for a single line, else from light violet to light teal."""
    if count == 1:
        return 191, 210, 252
    part = place / (count - 1)
    ends = zip((206, 190, 250), (150, 222, 210), strict=True)
    return tuple(round(a + (b - a) * part) for a, b in ends)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a hundredth of the points, true from the first on; NaN stays NaN."""
    keep = 1 - 1 / max(3.0, len(values) / 100)
    out, total, weight = np.full(len(values), np.nan), 0.0, 0.0
    for i, value in enumerate(values):
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            out[i] = total / weight
    return out


def _finite(line: Line) -> Line:
    """The line without what is not finite, thinned to what can be seen; spikes stay."""
    good = np.isfinite(line.values)
    steps, values = line.steps[good], line.values[good]
    if len(steps) > _POINTS:
        parts = np.array_split(np.arange(len(steps)), _POINTS // 2)
        ends = [part[[values[part].argmin(), values[part].argmax()]] for part in parts]
        kept = np.unique(np.concatenate(ends))
        steps, values = steps[kept], values[kept]
    return dataclasses.replace(line, steps=steps, values=values)


class Scale:
    """Maps values to 0..1 along an axis, chooses its ticks, and leaves room beyond the last."""

    def __init__(self, low: float, high: float, *, log: bool = False, room: float = 0.0):
        if log:
            self.ticks = _log_ticks(low, high)
            low, high = low / 1.1, high * 1.1
        else:
            step = nice_step(high - low)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
            self.ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
            high += room * (high - low)
        self._map = np.log if log else np.asarray
        self._low, self._high = float(self._map(low)), float(self._map(high))

    def __call__(self, values) -> np.ndarray:
        return (self._map(values) - self._low) / (self._high - self._low)


def nice_step(span: float, count: int = 6) -> float:
    """The least step of 1, 2 or 5 times a power of ten that cuts a span in at most `count`."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(k * power for k in (1, 2, 5, 10, 20) if span / (k * power) <= count * (1 + 1e-9))


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within a range; powers alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = [k * 10.0**p for p in powers for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    tens = [10.0**p for p in powers if low <= 10.0**p <= high]
    return tens if len(within) > 8 else within


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Writes ticks with as many digits as tell them apart: `0.25`, `20k`, `3e-4`."""
    largest = max(abs(tick) for tick in ticks)
    if 0 < largest < 0.01:
        return ["0" if tick == 0 else _power_of_ten(tick) for tick in ticks]
    unit, suffix = next(
        (pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= 10 * pair[0]),
        (1.0, ""),
    )
    labels = [f"{tick / unit:.6f}".rstrip("0").rstrip(".") for tick in ticks]
    digits = max(len(label.partition(".")[2]) for label in labels)
    return ["0" if tick == 0 else f"{tick / unit:.{digits}f}{suffix}" for tick in ticks]


def _short(value: float) -> str:
    """A value in three digits: `0.123`, `12.3k`, `3e-4`."""
    return _power_of_ten(value) if 0 < abs(value) < 0.001 else human_count(value)


def _power_of_ten(value: float) -> str:
    """`3e-4`, `1.5e-5`."""
    digits, power = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _value_scale(panel: Panel, lines: Sequence[Line]) -> Scale:
    """The scale of a panel's values; a few outliers of the faint lines do not stretch it."""
    clear = np.concatenate([line.values for line in lines if line.width > 1])
    faint = np.concatenate([line.values for line in lines])
    low = min(clear.min(), np.quantile(faint, 0.01))
    high = max(clear.max(), np.quantile(faint, 0.99))
    if panel.log and low > 0 and high > 20 * low:
        return Scale(low, high, log=True)
    if 0 <= low < 0.6 * high:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), 1e-30):  # all the same
        low, high = min(0.0, low), max(0.0, high)
    return Scale(low, high if high > low else low + 1.0, room=0.03)


def _draw_panel(panel: Panel, lines: Sequence[Line], last: float) -> PIL.Image.Image:
    """One panel: title, axes, grid, lines, legend."""
    image = PIL.Image.new("RGB", PANEL, _PAPER)
    across, up = Scale(0.0, max(last, 1.0)), _value_scale(panel, lines)
    plot = _draw_plot(lines, across, up)
    image.paste(plot, (_LEFT, _TOP))
    draw = PIL.ImageDraw.Draw(image)
    small, font, large = (PIL.ImageFont.load_default(size) for size in (14, 15, 18))
    bottom = _TOP + _PLOT[1]
    for tick, label in zip(across.ticks, tick_labels(across.ticks), strict=True):
        x = _LEFT + float(across(tick)) * (_PLOT[0] - 1)
        draw.text((x, bottom + 8), label, _SOFT, small, anchor="mt")
    for tick, label in zip(up.ticks, tick_labels(up.ticks), strict=True):
        y = bottom - 1 - float(up(tick)) * (_PLOT[1] - 1)
        draw.text((_LEFT - 9, y), label, _SOFT, small, anchor="rm")
    draw.text((_LEFT + _PLOT[0] / 2, PANEL[1] - 10), "step", _SOFT, small, anchor="ms")
    draw.text((_LEFT, _TOP - 14), panel.title, _INK, large, anchor="ls")
    ends = [line for line in lines if line.width > 1]
    x = float(_LEFT + _PLOT[0])
    for line in reversed(ends):
        text = _short(line.values[-1])
        draw.text((x, _TOP - 14), text, line.colour, font, anchor="rs")
        x -= draw.textlength(text, font) + 12
    if len(ends) > 1:
        _draw_legend(draw, ends, falling=ends[0].values[0] > ends[0].values[-1])
    return image


def _draw_plot(lines: Sequence[Line], across: Scale, up: Scale) -> PIL.Image.Image:
    """Grid and lines of a panel, drawn large and shrunk; what leaves the plot is cut off."""
    width, height = (side * _FINE for side in _PLOT)
    image = PIL.Image.new("RGB", (width, height), _PAPER)
    draw = PIL.ImageDraw.Draw(image)
    for tick in across(across.ticks):
        draw.line([(tick * (width - 1), 0), (tick * (width - 1), height)], _GRID, _FINE)
    for tick in up(up.ticks):
        y = (1 - tick) * (height - 1)
        draw.line([(0, y), (width, y)], _GRID, _FINE)
    for line in lines:
        x = across(line.steps) * (width - 1)
        floor = -10.0 * height  # far outside, where a line may leave but numbers stay small
        y = np.clip((1 - up(line.values)) * (height - 1), floor, -floor)
        points = list(zip(x.tolist(), y.tolist(), strict=True))
        draw.line(points, line.colour, round(line.width * _FINE), joint="curve")
        if line.dots or len(points) == 1:
            for point in points if len(points) <= 60 else points[-1:]:
                draw.circle(point, 3.5 * _FINE, line.colour)
    draw.line([(0, 0), (0, height - 1), (width, height - 1)], _SOFT, _FINE)
    return image.resize(_PLOT, PIL.Image.Resampling.BOX)


def _draw_legend(draw: PIL.ImageDraw.ImageDraw, lines: Sequence[Line], *, falling: bool) -> None:
    """The names of the lines, in the corner that the curve leaves free."""
    font = PIL.ImageFont.load_default(14)
    wide = max(draw.textlength(line.name, font) for line in lines) + 50
    tall = 22 * len(lines) + 8
    x = _LEFT + _PLOT[0] - wide - 10
    y = _TOP + 10 if falling else _TOP + _PLOT[1] - tall - 12
    draw.rounded_rectangle((x, y, x + wide, y + tall), 5, _PAPER, _GRID)
    for place, line in enumerate(lines):
        middle = y + 15 + 22 * place
        draw.line([(x + 10, middle), (x + 32, middle)], line.colour, 3)
        draw.text((x + 40, middle), line.name, _INK, font, anchor="lm")
