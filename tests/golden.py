"""Golden cases: inputs and outputs of the original PyTorch code, converted for this project."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.mapping import DROP, expand
from vl2jax.config import VL2Config
from vl2jax.model.vl2 import VL2
from vl2jax.processing.batch import TEXT, Batch
from vl2jax.processing.image import image_layout

DATA = pathlib.Path(__file__).parent / "fixtures"  # the part that is in the repository
MINIS = ("mini-tiny", "mini-small", "mini-base", "mini-extra")


def carried(name: str, case: str | None = None) -> bool:
    """Whether a mini checkpoint, and a golden case of it, are in tests/fixtures."""
    golden = DATA / name / "golden"
    return golden.is_dir() and (case is None or (golden / f"{case}.npz").exists())


def minis(names=MINIS, cases=(None,)) -> list:
    """Parameters `name`, or `name, case`; those not in tests/fixtures have the mark `reference`."""
    return [
        pytest.param(
            *(name, case)[: 1 if case is None else 2],
            marks=() if carried(name, case) else pytest.mark.reference,
        )
        for name in names
        for case in cases
    ]


@dataclasses.dataclass(frozen=True)
class Mini:
    """A random mini checkpoint, converted and loaded, with its golden cases."""

    name: str
    source: pathlib.Path
    config: VL2Config
    params: Any
    processor: Any

    @functools.cached_property
    def golden(self) -> dict:
        return json.loads((self.source / "golden" / "golden.json").read_text())

    def case(self, name: str) -> dict:
        return self.golden["cases"][name]

    def has(self, name: str) -> bool:
        return (self.source / "golden" / f"{name}.npz").exists()

    def arrays(self, name: str):
        return np.load(self.source / "golden" / f"{name}.npz")

    def images(self, sample: dict) -> list[pathlib.Path]:
        return [self.source / "golden" / image for image in sample["images"]]


def padded_batch(config: VL2Config, arrays) -> Batch:
    """The inputs of a golden case: left-padded, with positions counted from the padding."""
    ids, seen = arrays["in/input_ids"], arrays["in/attention_mask"]
    index = np.full(ids.shape, TEXT, np.int32)
    tiles: list[np.ndarray] = []
    for row, crops in enumerate(arrays["in/images_spatial_crop"]):
        layouts, used = [], 0
        for wide, high in crops[crops.all(axis=1)]:
            layouts.append(
                image_layout(
                    int(wide),
                    int(high),
                    config.tile_grid,
                    first_slot=len(tiles) + used,
                    global_view_pos=config.global_view_pos,
                )
            )
            used += 1 + wide * high
        pixels = arrays["in/images"][row, :used]
        tiles += list(np.rint((pixels * 0.5 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1))
        if layouts:
            index[row, arrays["in/images_seq_mask"][row].astype(bool)] = np.concatenate(layouts)
    side = config.vision.image_size
    return Batch(
        tiles=np.array(tiles, np.uint8).reshape(-1, side, side, 3),
        tokens=ids.astype(np.int32),
        image_index=index,
        positions=np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1)),
        segment_ids=seen.astype(np.int32),
        loss_mask=arrays["in/labels"] != -100,
    )


def enlarge(batch: Batch, rows: int, length: int, tiles: int) -> Batch:
    """Pads rows, tokens and tiles of a batch, so that many cases share one compilation."""

    def fit(x: np.ndarray, value) -> np.ndarray:
        pad = ((0, rows - x.shape[0]), (0, length - x.shape[1]))
        return np.pad(x, pad, constant_values=value)

    extra = tiles - len(batch.tiles)
    return Batch(
        tiles=np.pad(batch.tiles, ((0, extra), *((0, 0),) * 3)),
        tokens=fit(batch.tokens, 0),
        image_index=fit(batch.image_index, TEXT),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        segment_ids=fit(batch.segment_ids, 0),
        loss_mask=fit(batch.loss_mask, False),
    )


@functools.partial(jax.jit, static_argnames="config")
def _probe(config: VL2Config, params, batch: Batch):
    return VL2(config).apply(params, batch, mutable=["intermediates"])


def probe(mini: Mini, batch: Batch):
    """Returns the output and all sown intermediates of a forward pass."""
    output, state = _probe(mini.config, mini.params, batch)
    return output, state["intermediates"]


def by_original_name(config: VL2Config, tree) -> dict[str, np.ndarray]:
    """Converts a tree of parameters or gradients to the original's names and layouts."""
    found = {}
    for entry in expand(config):
        if entry.path is DROP:
            continue
        leaf = functools.reduce(lambda node, key: node.get(key, {}), entry.path.split("/"), tree)
        if not isinstance(leaf, dict):
            found[entry.hf] = entry.axes.backward(np.asarray(leaf)[entry.index])
    return found


def assert_close(got, want, atol: float, what: str, where=None) -> None:
    """Checks the maximum absolute difference where `where` is True; `got` may have padding."""
    got = np.asarray(got, np.float32)[tuple(map(slice, np.shape(want)))]
    difference = np.abs(got - np.asarray(want))
    if where is not None:
        difference = difference[where]
    assert np.isfinite(difference).all(), what
    assert difference.max(initial=0) <= atol, f"{what}: {difference.max():.2e} above {atol:.0e}"


def all_tokens(batch: Batch) -> jnp.ndarray:
    """Segment ids for the load balance that count padding, too, as the original does."""
    return jnp.ones_like(batch.segment_ids)
