"""Preview of packed batches as text and an image, to check the data before training."""

import itertools
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw

from vl2jax.data.packing import supervised
from vl2jax.data.pipeline import PackedBatch
from vl2jax.processing.batch import FIRST_TILE_ROW, VIEW_SEPERATOR, Batch
from vl2jax.processing.processor import Processor

PICTURE = "preview.png"
_COLUMNS = 8  # maximum number of tiles side by side
_LEAST_SIDE, _MOST_SIDE = 112, 192  # range of the side of a tile in pixels
_MARGIN, _LABEL = 6, 14
_BACKGROUND = (208, 208, 208)  # grey, so that the edges of white tiles are visible


def preview(
    batches: Iterable[PackedBatch],
    processor: Processor,
    out_dir: str | os.PathLike,
    count: int,
    stream: TextIO | None = None,
) -> list[str]:
    """Prints the first samples of packed batches, and writes their tiles to preview.png.

    Supervised text is green and underlined on a terminal, and between ⟦ and ⟧ elsewhere.  Each run
    of visual tokens is shown as one placeholder.

    Args:
      batches: packed batches; read as far as needed.
      processor: its tokenizer decodes the text.
      out_dir: folder of preview.png, which is not written if the samples have no tiles.
      count: number of samples.
      stream: where to write the text; None: standard output.

    Returns:
      The text of each sample.
    """
    out = sys.stdout if stream is None else stream
    marks = ("\x1b[4;32m", "\x1b[0m") if out.isatty() else ("⟦", "⟧")
    blocks, tiles = [], []
    for number, (title, sample) in enumerate(itertools.islice(_samples(batches), count), 1):
        slots = _slots(sample.image_index, processor.config.tokens_per_tile)
        facts = f"{len(sample.tokens)} tokens, {supervised(sample).sum()} supervised"
        text = _text(sample, processor, marks)
        blocks.append(f"sample {number}: {title}, {facts}, {len(slots)} tiles\n{text}\n")
        out.write(blocks[-1] + "\n")
        tiles += [(f"{number}: tile {i}", sample.tiles[s]) for i, s in enumerate(slots, 1)]
    if tiles:
        path = pathlib.Path(out_dir) / PICTURE
        path.parent.mkdir(parents=True, exist_ok=True)
        _contact_sheet(tiles).save(path)
        out.write(f"{len(tiles)} tiles: {path}\n")
    else:
        out.write("these samples have no pictures\n")
    return blocks


def _samples(batches: Iterable[PackedBatch]) -> Iterator[tuple[str, Batch]]:
    """The title of each sample, and its part of the batch: fields [T], and its pool's tiles."""
    for number, packed in enumerate(batches, 1):
        names = zip(packed.names, packed.rows, strict=True)
        pools, rows, _ = packed.batch.tokens.shape
        for pool, row in itertools.product(range(pools), range(rows)):
            line = jax.tree.map(lambda x, p=pool: x[p], packed.batch)
            segments = line.segment_ids[row]
            for segment in range(1, segments.max() + 1):
                columns = np.flatnonzero(segments == segment)
                span = slice(columns[0], columns[-1] + 1)
                name, index = next(names)
                title = (
                    f"{name} (number {index}), batch {number} pool {pool} row {row}"
                    f" segment {segment} columns {columns[0]}..{columns[-1]}"
                )
                cut = jax.tree.map(lambda x, r=row, s=span: x[r, s], line.replace(tiles=None))
                yield title, cut.replace(tiles=line.tiles)


def _slots(image_index: np.ndarray, tokens_per_tile: int) -> list[int]:
    """Tile slots of a sample, in order."""
    rows = image_index[image_index >= FIRST_TILE_ROW]
    return np.unique((rows - FIRST_TILE_ROW) // tokens_per_tile).tolist()


def _text(sample: Batch, processor: Processor, marks: tuple[str, str]) -> str:
    """Decoded tokens; supervised runs are between marks, visual tokens become a placeholder."""
    kinds = np.where(sample.image_index >= 0, 2, supervised(sample))
    cuts = np.flatnonzero(np.diff(kinds)) + 1
    parts = []
    for columns in np.split(np.arange(len(kinds)), cuts):
        kind, index = kinds[columns[0]], sample.image_index[columns]
        if kind == 2:
            images = int((index == VIEW_SEPERATOR).sum())
            tiles = len(_slots(index, processor.config.tokens_per_tile))
            name = "image" if images == 1 else f"{images} images"
            parts.append(f"<{name}: {len(columns)} tokens, {tiles} tiles>")
            continue
        text = processor.tokenizer.decode(sample.tokens[columns])
        parts.append(f"{marks[0]}{text}{marks[1]}" if kind else text)
    return "".join(parts)


def _contact_sheet(tiles: list[tuple[str, np.ndarray]]) -> PIL.Image.Image:
    """Contact sheet of tiles, `_COLUMNS` per row, each with its label above."""
    side = int(np.clip(tiles[0][1].shape[0], _LEAST_SIDE, _MOST_SIDE))
    across, down = min(_COLUMNS, len(tiles)), -(-len(tiles) // _COLUMNS)
    step_x, step_y = side + _MARGIN, side + _MARGIN + _LABEL
    sheet = PIL.Image.new("RGB", (across * step_x + _MARGIN, down * step_y + _MARGIN), _BACKGROUND)
    draw = PIL.ImageDraw.Draw(sheet)
    for number, (label, pixels) in enumerate(tiles):
        x = _MARGIN + number % _COLUMNS * step_x
        y = _MARGIN + number // _COLUMNS * step_y
        draw.text((x, y), label, fill="black")
        sheet.paste(PIL.Image.fromarray(pixels).resize((side, side)), (x, y + _LABEL))
    return sheet
