"""Tests of packing: budgets are kept, no sample starves, and packed rows equal their samples."""

import dataclasses
import types

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError
from vl2jax.data.packing import BatchShape, Packer, Place, Plan, assemble, supervised
from vl2jax.processing.batch import FIRST_TILE_ROW
from vl2jax.processing.collate import Sample

SIDE, PER_TILE, PAD = 2, 4, 99


def make(tokens, tiles=0, start=0):
    """A sample with tokens start, start + 1, ...; `start` is also the value of its pixels."""
    index = np.full(tokens, -1, np.int32)
    index[1 : 1 + tiles * PER_TILE] = FIRST_TILE_ROW + np.arange(tiles * PER_TILE)
    return Sample(
        tokens=np.arange(start, start + tokens, dtype=np.int32),
        image_index=index,
        loss_mask=np.ones(tokens, bool),
        tiles=np.full((tiles, SIDE, SIDE, 3), start % 256, np.uint8),
        image_sizes=((8, 8),) * bool(tiles),
        image_tiles=((1, 1),) * bool(tiles),
        image_tokens=(tiles * PER_TILE,) * bool(tiles),
        prompt_length=1,
        display="",
    )


def item(number, tokens, tiles=0):
    return types.SimpleNamespace(number=number, sample=make(tokens, tiles, start=number))


def build(placed, shape):
    pairs = [(place, item.sample) for place, item in placed]
    return assemble(pairs, shape, pad_id=PAD, tile_side=SIDE, tokens_per_tile=PER_TILE)


SHAPES = [
    BatchShape(pools=1, rows=3, length=64, tiles=7, segments=64),
    BatchShape(pools=4, rows=2, length=48, tiles=4, segments=3),
    BatchShape(pools=2, rows=4, length=40, tiles=5, segments=1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_budgets_hold_and_every_sample_comes_once(shape, seed):
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 4, 300)
    items = [item(i, int(rng.integers(n * PER_TILE + 2, 38)), int(n)) for i, n in enumerate(tiles)]
    packer, stream, seen, age = Packer(shape, waiting=6), iter(items), [], {}
    while placed := packer.fill(stream):
        columns = np.zeros((shape.pools, shape.rows, shape.length), int)
        slots = np.zeros((shape.pools, shape.tiles), int)
        for place, it in placed:
            end = place.offset + len(it.sample)
            assert end <= shape.length and place.slot + len(it.sample.tiles) <= shape.tiles
            columns[place.pool, place.row, place.offset : end] += 1
            slots[place.pool, place.slot : place.slot + len(it.sample.tiles)] += 1
            assert 1 <= place.segment <= shape.segments
        assert columns.max() <= 1 and slots.max() <= 1
        segments = build(placed, shape).segment_ids
        for row in segments.reshape(-1, shape.length):
            used = row[row > 0]
            assert sorted(set(used)) == list(range(1, 1 + used.max(initial=0)))
            assert (np.diff(used) >= 0).all()
        seen += [it.number for _, it in placed]
        assert len(packer.waiting) <= 6
        for it in packer.waiting:
            age[it.number] = age.get(it.number, 0) + 1
    assert sorted(seen) == list(range(300)) and not packer.waiting
    # Each batch places the oldest waiting item, so with six waiting none waits for more than six.
    assert max(age.values()) <= 6


def test_those_that_wait_come_first():
    shape = BatchShape(pools=1, rows=1, length=10, tiles=0, segments=9)
    packer = Packer(shape, waiting=2)
    stream = iter([item(0, 6), item(1, 7), item(2, 3), item(3, 9), item(4, 1), item(5, 1)])
    assert [it.number for _, it in packer.fill(stream)] == [0, 2]
    assert [it.number for it in packer.waiting] == [1, 3]
    assert next(stream).number == 4  # not read, because two items were waiting
    assert [it.number for _, it in packer.fill(stream)] == [1, 5]
    assert [it.number for _, it in packer.fill(stream)] == [3]
    assert packer.fill(stream) == []


def test_a_full_batch_reads_nothing_more():
    shape = BatchShape(pools=1, rows=2, length=10, tiles=0, segments=1)
    packer, stream = Packer(shape), iter([item(i, 3) for i in range(5)])
    assert [it.number for _, it in packer.fill(stream)] == [0, 1]
    assert next(stream).number == 2


def test_best_row_and_balanced_pools():
    plan = Plan(BatchShape(pools=2, rows=2, length=10, tiles=4, segments=9))
    assert plan.add(6, 2) == Place(pool=0, row=0, segment=1, offset=0, slot=0)
    assert plan.add(7, 1) == Place(pool=1, row=0, segment=1, offset=0, slot=0)
    assert plan.add(2, 1) == Place(pool=1, row=0, segment=2, offset=7, slot=1)  # 3 slots to 2
    assert plan.add(4, 0) == Place(pool=0, row=0, segment=2, offset=6, slot=2)  # fills the row
    assert plan.add(9, 3) is None  # rows are free, but no pool has three slots
    assert plan.add(11, 0) is None
    assert not plan.full
    assert [plan.add(10, 0).pool, plan.add(10, 0).pool, plan.add(1, 0).pool] == [0, 1, 1]
    assert plan.full


def test_fill_is_good():
    rng = np.random.default_rng(0)

    def stream():
        while True:
            tiles = int(rng.integers(0, 5))
            yield item(0, tiles * PER_TILE + int(rng.integers(4, 60)), tiles)

    shape = BatchShape(pools=4, rows=4, length=128, tiles=32, segments=64)
    packer, source, used, imbalance = Packer(shape), stream(), [], []
    for _ in range(30):
        placed = packer.fill(source)
        used.append(sum(len(it.sample) for _, it in placed) / (16 * 128))
        tiles = np.bincount([p.pool for p, _ in placed], [len(it.sample.tiles) for _, it in placed])
        imbalance.append(tiles.max() / tiles.mean())
    assert np.mean(used) > 0.95 and np.mean(imbalance) < 1.15


def test_a_packed_batch_by_hand():
    shape = BatchShape(pools=2, rows=1, length=12, tiles=2, segments=4)
    placed = [
        (Place(pool=0, row=0, segment=1, offset=0, slot=0), item(10, 6, 1)),
        (Place(pool=0, row=0, segment=2, offset=6, slot=1), item(30, 5, 1)),
        (Place(pool=1, row=0, segment=1, offset=0, slot=0), item(50, 3)),
    ]
    batch = build(placed, shape)
    assert batch.tokens.shape == (2, 1, 12) and batch.tokens.dtype == np.int32
    row = [10, 11, 12, 13, 14, 15, 30, 31, 32, 33, 34, 99]
    assert batch.tokens.tolist() == [[row], [[50, 51, 52] + [99] * 9]]
    assert batch.image_index[0, 0].tolist() == [-1, 2, 3, 4, 5, -1, -1, 6, 7, 8, 9, -1]
    assert (batch.image_index[1] == -1).all()
    assert batch.positions[0, 0, :11].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert batch.segment_ids.tolist() == [[[1] * 6 + [2] * 5 + [0]], [[1] * 3 + [0] * 9]]
    assert batch.loss_mask[:, 0].sum(axis=1).tolist() == [11, 3]
    assert supervised(batch)[0, 0].tolist() == [False, *[True] * 5, False, *[True] * 4, False]
    assert batch.tiles.shape == (2, 2, SIDE, SIDE, 3) and batch.tiles.dtype == np.uint8
    assert batch.tiles[:, :, 0, 0, 0].tolist() == [[10, 30], [0, 0]]


def test_packed_samples_read_the_same_tiles_as_alone(processor):
    rng = np.random.default_rng(0)
    samples = []
    for width, height, answer in ((110, 55, "red"), (50, 130, "two 中文"), (60, 60, "yes")):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        turns = [{"role": "user", "content": "<image>\nWhat?"}]
        turns += [{"role": "assistant", "content": answer}]
        samples.append(processor.sample(turns, [PIL.Image.fromarray(pixels)], inference=False))
    longest = max(map(len, samples))
    shape = BatchShape(pools=2, rows=1, length=2 * longest, tiles=8, segments=2)
    plan = Plan(shape)
    placed = [(plan.add(len(sample), len(sample.tiles)), sample) for sample in samples]
    assert len({(place.pool, place.row) for place, _ in placed}) == 2
    q = processor.config.tokens_per_tile
    batch = assemble(placed, shape, pad_id=7, tile_side=56, tokens_per_tile=q)
    for place, sample in placed:
        alone = processor.collate([sample])
        here = (place.pool, place.row, slice(place.offset, place.offset + len(sample)))
        assert (batch.segment_ids[here] == place.segment).all()
        for field in ("tokens", "positions", "loss_mask"):
            np.testing.assert_array_equal(getattr(batch, field)[here], getattr(alone, field)[0])
        packed_rows = _table(batch.tiles[place.pool], q)[batch.image_index[here]]
        np.testing.assert_array_equal(packed_rows, _table(alone.tiles, q)[alone.image_index[0]])


def _table(tiles, tokens_per_tile):
    """A visual table whose values identify tile and row; its last value is for text."""
    sums = tiles.reshape(len(tiles), 1, -1).astype(np.int64).sum(-1)
    rows = sums * tokens_per_tile + np.arange(tokens_per_tile)
    return np.concatenate([[-1, -2], rows.ravel(), [-3]])


def test_samples_that_fit_nowhere():
    shape = BatchShape(pools=1, rows=2, length=20, tiles=3, segments=4)
    shape.check(20, 3)
    message = r"has 21 tokens, but a row only 20: raise config\.batch\.length to 21"
    with pytest.raises(UserError, match=message):
        shape.check(21, 0)
    message = r"has 4 tiles, but a part of the batch only 3 slots: raise config\.batch\.tiles to 4"
    with pytest.raises(UserError, match=message):
        shape.check(18, 4)
    for change in ({"rows": 0}, {"segments": 0}, {"tiles": -1}, {"length": 0}, {"pools": 0}):
        name, value = next(iter(change.items()))
        with pytest.raises(UserError, match=rf"config\.batch\.{name} is {value}, expected"):
            dataclasses.replace(shape, **change)
