"""How our plots look: palette, axes, and figures of panels; drawn by matplotlib, the extra `plots`.

Figures are objects of their own: nothing here touches pyplot, its windows or its settings.
"""

import math

from vl2jax.common.errors import UserError

INK, SOFT, GRID = "#262a33", "#6b7280", "#e5e7eb"  # titles; labels and the axis; the grid
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"
PANEL = 5.6, 3.8  # inches
DPI = 150


def make_panels(count: int, columns: int):
    """A figure of panels, row by row.

    Returns:
      A `matplotlib.figure.Figure`, which `savefig` writes, and its `count` axes.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        # Half a second, which only those who draw pay.
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
    """A title on the left, a light grid below the data, one axis line, no ticks."""
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=10, color=SOFT)
    axes.tick_params(length=0, labelsize=10, labelcolor=SOFT, pad=6)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def add_legend(axes, **options) -> None:
    """A legend without a frame, which hides the grid behind it."""
    box = dict(facecolor="white", edgecolor="none", framealpha=1, borderpad=0.2, borderaxespad=0)
    text = dict(fontsize=10, labelcolor=SOFT, handletextpad=0.5, columnspacing=1.4)
    axes.legend(**box | text | options)
