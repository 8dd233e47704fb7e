"""Plot style: palette, axes, and figures of panels.  Needs matplotlib (the extra `plots`).

Figures are made without pyplot, so its global state and settings are not touched.
"""

import math

from vl2jax.common.errors import UserError

INK, SOFT, GRID = "#262a33", "#6b7280", "#e5e7eb"  # titles; labels and axis line; grid
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"
PANEL = 5.6, 3.8  # inches
DPI = 150


def make_panels(count: int, columns: int):
    """Makes a figure with a grid of panels.

    Args:
      count: number of panels.
      columns: panels per row.

    Returns:
      A `matplotlib.figure.Figure`, and its `count` axes, row by row.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        # Imported here because it takes half a second.
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UserError(f'plots need matplotlib; pip install "vl2jax[plots]" ({error})') from error
    rows = math.ceil(count / columns)
    size = columns * PANEL[0], rows * PANEL[1]
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15, wspace=0.02, hspace=0.02)
    figure = Figure(size, dpi=DPI, layout=layout)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def style_axes(axes, title: str, xlabel: str = "") -> None:
    """Styles axes: title on the left, light grid behind the data, only the bottom axis line."""
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=10, color=SOFT)
    axes.tick_params(length=0, labelsize=10, labelcolor=SOFT, pad=6)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def add_legend(axes, **options) -> None:
    """Adds a legend without a frame, on a white background that hides the grid."""
    box = dict(facecolor="white", edgecolor="none", framealpha=1, borderpad=0.2, borderaxespad=0)
    text = dict(fontsize=10, labelcolor=SOFT, handletextpad=0.5, columnspacing=1.4)
    axes.legend(**box | text | options)
