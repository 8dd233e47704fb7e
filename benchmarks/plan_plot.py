"""Plots for docs/scaling.md: bytes sent by a chip by size of the expert axis, and its memory."""

import pathlib
from collections.abc import Sequence

from vl2jax.common import plots

COLOURS = (plots.BLUE, plots.ORANGE, plots.GREY)


def sent_per_token(entry: dict) -> tuple[float, float]:
    """Bytes that a chip sends per local token: for the exchange of tokens, and for the rest."""
    own = entry["tokens"] / entry["devices"]
    exchange = sum(n["bytes"] for name, n in entry["collectives"].items() if _exchange(name))
    everything = sum(n["bytes"] for n in entry["collectives"].values())
    return exchange / own, (everything - exchange) / own


def _exchange(name: str) -> bool:
    return name.endswith(" over expert") and not name.startswith("all-reduce")


def draw(widths: Sequence[dict], chips: Sequence[dict], out: pathlib.Path) -> None:
    """Draws both panels and writes them to a PNG file.

    Args:
      widths: results of the group "width" of `plan_table`.
      chips: results of the group "chips".
      out: file to write.
    """
    figure, (sent, held) = plots.make_panels(2, columns=2)
    plots.style_axes(
        sent,
        "Small on 32 chips: kB sent by a chip per token of its own",
        "places on the expert axis",
    )
    bytes_sent = [[part / 1e3 for part in sent_per_token(entry)] for entry in widths]
    places = [str(entry["mesh"]["expert"]) for entry in widths]
    _draw_bars(sent, places, ("exchange of tokens", "weights and gradients"), bytes_sent)
    plots.style_axes(held, "Base, a row of 4096 tokens per chip: GiB on a chip", "chips")
    parts = ("parameters", "optimizer", "temporaries")
    bytes_held = [[entry["bytes"][part] / 2**30 for part in parts] for entry in chips]
    _draw_bars(held, [str(entry["devices"]) for entry in chips], parts, bytes_held)
    figure.savefig(out, format="png")


def _draw_bars(
    axes, labels: Sequence[str], names: Sequence[str], stacks: Sequence[Sequence[float]]
) -> None:
    """Draws stacked bars, one stack per label and one colour per name."""
    base = [0.0] * len(stacks)
    for name, colour, values in zip(names, COLOURS, zip(*stacks, strict=True), strict=False):
        axes.bar(labels, values, 0.6, bottom=base, color=colour, label=name)
        base = [low + value for low, value in zip(base, values, strict=True)]
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    plots.add_legend(axes, loc="upper right", handlelength=0.9, handleheight=0.9, reverse=True)
