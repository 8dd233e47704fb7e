"""Two plots for docs/scaling.md: what a chip sends as the expert axis grows, and what it holds."""

import pathlib
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

PANEL, FINE = (560, 380), 2
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 74, 50
INK, SOFT, GRID, PAPER = (38, 42, 51), (107, 114, 128), (229, 231, 235), (255, 255, 255)
COLOURS = ((37, 99, 235), (234, 88, 12), (148, 163, 184))


def sent_per_token(entry: dict) -> tuple[float, float]:
    """Bytes that a chip sends per token of its own: tokens over `expert`; all else."""
    own = entry["tokens"] / entry["devices"]
    exchange = sum(n["bytes"] for name, n in entry["collectives"].items() if _exchange(name))
    everything = sum(n["bytes"] for n in entry["collectives"].values())
    return exchange / own, (everything - exchange) / own


def _exchange(name: str) -> bool:
    return name.endswith(" over expert") and not name.startswith("all-reduce")


def draw(widths: Sequence[dict], chips: Sequence[dict], out: pathlib.Path) -> None:
    """Writes a PNG of both panels side by side."""
    sent = [[part / 1e3 for part in sent_per_token(entry)] for entry in widths]
    parts = ("parameters", "optimizer", "temporaries")
    held = [[entry["bytes"][part] / 2**30 for part in parts] for entry in chips]
    panels = [
        _panel(
            "Small on 32 chips: kB sent by a chip per token of its own",
            ("exchange of tokens", "weights and gradients"),
            [str(entry["mesh"]["expert"]) for entry in widths],
            sent,
            "places on the expert axis",
        ),
        _panel(
            "Base, a row of 4096 tokens per chip: GiB on a chip",
            parts,
            [str(entry["devices"]) for entry in chips],
            held,
            "chips",
        ),
    ]
    image = PIL.Image.new("RGB", (2 * PANEL[0], PANEL[1]), PAPER)
    for place, panel in enumerate(panels):
        image.paste(panel, (place * PANEL[0], 0))
    image.save(out, optimize=True)


def _panel(
    title: str,
    names: Sequence[str],
    labels: Sequence[str],
    stacks: Sequence[Sequence[float]],
    below: str,
) -> PIL.Image.Image:
    """Stacked bars."""
    image = PIL.Image.new("RGB", (PANEL[0] * FINE, PANEL[1] * FINE), PAPER)
    pen = PIL.ImageDraw.Draw(image)

    def font(size: int):
        return PIL.ImageFont.load_default(size * FINE)

    def text(x: float, y: float, what: str, anchor: str, size: int = 12, ink=SOFT) -> None:
        pen.text((x * FINE, y * FINE), what, ink, font(size), anchor=anchor)

    wide, high = PANEL[0] - LEFT - RIGHT, PANEL[1] - TOP - BOTTOM
    top = max((sum(stack) for stack in stacks), default=1.0)
    step = next(s for p in range(-3, 9) for s in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if s * 6 > top)
    top = step * -(-top // step)
    text(LEFT, 14, title, "lt", 14, INK)
    across = LEFT
    for name, colour in zip(names, COLOURS, strict=False):
        box = [across * FINE, 42 * FINE, (across + 11) * FINE, 53 * FINE]
        pen.rectangle(box, fill=colour)
        text(across + 16, 47.5, name, "lm")
        across += 32 + pen.textlength(name, font(12)) / FINE
    for tick in range(round(top / step) + 1):
        y = TOP + high * (1 - tick * step / top)
        pen.line([LEFT * FINE, y * FINE, (LEFT + wide) * FINE, y * FINE], GRID, FINE)
        text(LEFT - 8, y, f"{tick * step:g}", "rm")
    slot = wide / max(len(stacks), 1)
    for place, (label, stack) in enumerate(zip(labels, stacks, strict=True)):
        x, base = LEFT + slot * (place + 0.2), TOP + high
        for value, colour in zip(stack, COLOURS, strict=False):
            tip = base - high * value / top
            pen.rectangle([x * FINE, tip * FINE, (x + 0.6 * slot) * FINE, base * FINE], fill=colour)
            base = tip
        text(x + 0.3 * slot, TOP + high + 8, label, "mt")
    text(LEFT + wide / 2, PANEL[1] - 10, below, "mb")
    return image.resize(PANEL, PIL.Image.LANCZOS)
