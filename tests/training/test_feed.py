"""Batches depend on the numbers of data shards and pools, not on the mesh; tiles are balanced.

Held-out data: each row is read once, by the process that uses it.
"""

import contextlib
import dataclasses
import itertools
import json
import threading
import types
import unittest.mock

import jax
import numpy as np
import pytest
import smallest

from vl2jax.common.errors import UserError
from vl2jax.data.packing import WAITING, BatchShape
from vl2jax.data.pipeline import make_pipeline
from vl2jax.parallel.sharding import make_mesh
from vl2jax.processing.batch import FIRST_TILE_ROW
from vl2jax.processing.processor import Processor
from vl2jax.synthetic import Synthetic
from vl2jax.synthetic.tokens import write_processor_files
from vl2jax.training import setup
from vl2jax.training.feed import Feed, FeedIterator, choose_pools, fill_metrics
from vl2jax.training.run_config import BatchConfig, RunConfig, read_run_config


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from configs import tiny

    path = tmp_path_factory.mktemp("processor")
    write_processor_files(path, tiny.architecture())
    return Processor.from_dir(path, tiny.architecture())


def feed(processor, pools: int, shards: int, passed_over=(), on_skip=None, **axes) -> Feed:
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | axes)
    shape = BatchShape(2 * pools // shards, 1, 320, 8, 4)  # two microbatches

    def pipeline(shard: int):
        sources = [(Synthetic("train", seed=0), 1.0)]
        split = dict(process_index=shard, process_count=shards)
        return make_pipeline(sources, processor, shape, mask_prompt=True, seed=0, **split)

    return Feed(mesh, pools, shards, pipeline, passed_over=passed_over, on_skip=on_skip)


def take(feed: Feed, count: int, state=None):
    """Takes `count` batches; returns them as NumPy arrays, with their metrics and the new state."""
    iterator = iter(feed)
    if state is not None:
        iterator.set_state(state)
    found = [next(iterator) for _ in range(count)]
    state = iterator.get_state(found[-1])
    iterator.close()
    return (
        [jax.device_get(device_batch.batch) for device_batch in found],
        [fill_metrics(f) for f in found],
        state,
    )


def test_the_same_batches_on_any_mesh(processor):
    first = feed(processor, pools=4, shards=2, data=2, expert=2, tensor=2)
    want, metrics, state = take(first, 4)
    assert want[0].tokens.shape == (2, 4, 320) and want[0].tiles.shape[:2] == (2, 32)
    begin, _, middle = take(first, 2)
    assert state["pools"] == 4 and len(state["shards"]) == 2
    other = feed(processor, pools=4, shards=2, data=2, tensor=4)
    end, again, _ = take(other, 2, middle)
    for got, expected in zip([*begin, *end], want, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert again[0]["data/tile_fill"] == metrics[2]["data/tile_fill"]
    fills = [(batch.segment_ids > 0).mean() for batch in want]
    np.testing.assert_allclose([m["data/token_fill"] for m in metrics], fills, rtol=1e-6)


def test_every_pool_reads_its_own_tiles_and_they_are_balanced(processor):
    device_batch = feed(processor, pools=8, shards=1, data=8)
    batches, metrics, _ = take(device_batch, 4)
    per_tile, imbalance = processor.config.tokens_per_tile, []
    for batch in batches:
        highest = batch.image_index.reshape(2, 8, -1).max(axis=-1)
        # The slots of a pool are filled in order, so its highest index gives the number in use.
        used = np.maximum((highest - FIRST_TILE_ROW) // per_tile + 1, 0)
        assert used.max() <= 8
        imbalance.append(used.max(axis=1).sum() / used.mean(axis=1).sum() - 1)
    got = [one["data/tile_imbalance"] for one in metrics]
    np.testing.assert_allclose(got, imbalance, rtol=1e-5, atol=1e-6)
    assert all(0 <= value < 1 for value in got)


def test_pools_and_shards_are_chosen():
    mesh = make_mesh({"data": 2, "fsdp": 1, "expert": 2, "tensor": 2})
    batch = types.SimpleNamespace(rows=24, tiles=48, microbatches=2)
    assert choose_pools(mesh, batch, 0, None) == (4, 1)
    assert choose_pools(mesh, batch, 2, None) == (4, 2)
    assert choose_pools(mesh, batch, 3, None) == (12, 3)
    saved = {"pools": 12, "shards": [{}, {}]}
    assert choose_pools(mesh, batch, 0, saved) == (12, 2)
    assert choose_pools(mesh, batch, 0, saved | {"pools": 16}) == (4, 2)  # 16 does not divide 24
    with pytest.raises(
        UserError, match=r"data\.shards is 4, but the checkpoint .* with 2 data shards"
    ):
        choose_pools(mesh, batch, 4, saved)
    few = BatchConfig(rows=6, length=8, tiles=12)
    with pytest.raises(UserError, match=r"multiples of 4 .*got 6 and 12"):
        choose_pools(mesh, few, 0, None)


def heldout_config(batches: int, source: str = "synthetic", **batch: int) -> RunConfig:
    config = smallest.get_config()
    config.data.heldout, config.eval.batches = source, batches
    config.batch.update(batch)
    config.data.on_error = "skip"
    return read_run_config(config.to_dict())


def heldout_feed(config: RunConfig, processor, shards: int = 1) -> Feed:
    mesh = make_mesh({"data": shards, "fsdp": 1, "expert": 1, "tensor": 8 // shards})
    found = setup.make_heldout(config, mesh, processor, lambda message: None, shards, shards)
    assert found is not None
    return found


def every(feed: Feed) -> list:
    iterator = iter(feed)
    found = list(iterator)
    iterator.close()
    return found


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("threads", [1, 8])
def test_heldout_data_are_read_once_and_as_far_as_needed(processor, monkeypatch, batches, threads):
    """Beside what waits in the packer, at most a sample for each row of a batch is read ahead."""
    read = []

    class Counted(Synthetic):
        def __getitem__(self, number):
            read.append(number)
            return super().__getitem__(number)

    monkeypatch.setattr(setup, "Synthetic", Counted)
    config = heldout_config(batches, rows=8, tiles=64)
    data = dataclasses.replace(config.data, threads=threads, prefetch=4)
    config = dataclasses.replace(config, data=data)
    found = every(heldout_feed(config, processor))
    assert len(found) == batches
    used = sum(one.packed[0].samples for one in found)
    assert len(read) == len(set(read)) <= used + WAITING + config.batch.rows
    # They are the first batches of the data without a limit.
    source = Synthetic("heldout", seed=config.seed, lessons=False)
    shape = BatchShape(1, 8, config.batch.length, 64, config.batch.segments)
    once = dict(shuffle=False, repeat=False)
    whole = make_pipeline([(source, 1.0)], processor, shape, mask_prompt=True, seed=0, **once)
    with contextlib.closing(iter(whole)) as iterator:
        for one, want in zip(found, itertools.islice(iterator, batches), strict=True):
            got = jax.device_get(one.batch)
            jax.tree.map(np.testing.assert_array_equal, got, want.batch)


@pytest.mark.parametrize(("rows", "batches"), [(5, 3), (4, 2), (1, 1)])
@pytest.mark.parametrize("bad", [False, True])
def test_processes_read_their_own_held_out_rows(processor, tmp_path, rows, batches, bad):
    """Data shards may end at different batches, and have no or no valid row."""
    written = [{"text": f"{number} " * (number + 3)} for number in range(rows)]
    if bad:
        written[1::2] = [{"text": 0}] * (rows // 2)
    path = tmp_path / "held.json"
    path.write_text(json.dumps(written))
    config = heldout_config(10, str(path), rows=2, tiles=0, segments=1, length=240)
    feed = heldout_feed(config, processor, shards=2)
    found = every(feed)
    assert len(found) == batches
    valid = range(0, rows, 2) if bad else range(rows)
    for shard in (0, 1):
        read = np.concatenate([one.packed[shard].rows for one in found])
        assert read.tolist() == [row for row in valid if row % 2 == shard]
    alone = heldout_feed(heldout_config(10, str(path), rows=1, tiles=0, segments=1), processor)
    for name in ("tokens", "supervised"):
        total = sum(float(one.totals[name]) for one in found)
        assert total == sum(float(one.totals[name]) for one in every(alone)) > 0


def test_held_out_data_without_a_valid_row(processor, tmp_path):
    path = tmp_path / "held.json"
    path.write_text(json.dumps([{"text": 0}]))
    config = heldout_config(2, str(path), tiles=0)
    with pytest.raises(UserError, match="the data has no valid row, 1 are malformed"):
        every(heldout_feed(config, processor))
    assert every(heldout_feed(config, processor, shards=2)) == []


def test_batches_that_are_passed_over(processor):
    """The others are the same bit for bit, also after a resume in the midst of them."""
    axes, told = dict(pools=8, shards=2, data=8), []
    want, _, end = take(feed(processor, **axes), 6)
    spans = (range(2, 4), range(5, 6))
    first = feed(processor, passed_over=spans, on_skip=told.append, **axes)
    got, _, after = take(first, 3)
    for one, number in zip(got, (1, 4, 6), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, want[number - 1])
    assert after == end and after["batches"] == 6
    _, _, begun = take(first, 1)
    assert begun["batches"] == 1
    rest, *_ = take(first, 2, begun)
    for one, again in zip(rest, got[1:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, again)
    assert told[0].startswith("batch 2 (synthetic train row ")
    assert told[0].endswith(", ...), see config.data.skip_batches")


class Fails:
    """A pipeline whose iterator gives four batches and then an error."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __iter__(self):
        return FailsIterator(iter(self.pipeline))


class FailsIterator:
    def __init__(self, iterator):
        self.iterator, self.left = iterator, 4
        self.get_state, self.close = iterator.get_state, iterator.close

    def __next__(self):
        self.left -= 1
        if self.left < 0:
            raise UserError("data.json:5: malformed")
        return next(self.iterator)


@pytest.mark.parametrize(("processes", "asking"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1])])
def test_a_process_that_cannot_read_on_says_so_two_batches_before(
    processor, monkeypatch, processes, asking
):
    """So all processes know it before they start a step for which there is no batch."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    gathered = lambda x: np.stack([x] * processes)  # noqa: E731
    monkeypatch.setattr("vl2jax.training.feed.multihost_utils.process_allgather", gathered)
    source = feed(processor, pools=8, shards=1, data=8)
    source.pipelines = {number: Fails(one) for number, one in source.pipelines.items()}
    batches, found, states = iter(source), [], []
    for _ in range(4):
        found.append(next(batches))
        states.append(dict(found[-1].after))
    assert [bool(one.totals["stop"] > 0) for one in found] == [bool(x) for x in asking]
    with pytest.raises(UserError, match="malformed"):
        next(batches)
    batches.close()
    # The state is that after the batch, not after what was read ahead.
    whole = iter(feed(processor, pools=8, shards=1, data=8))
    assert [next(whole).after for _ in range(4)] == states
    whole.close()


def test_processes_that_cannot_begin(processor, monkeypatch):
    """If one process cannot read its first batches, none of them starts a step."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gathered = lambda x: np.stack([x, ~x])  # noqa: E731
    monkeypatch.setattr("vl2jax.training.feed.multihost_utils.process_allgather", gathered)
    batches = iter(feed(processor, pools=8, shards=1, data=8))
    with pytest.raises(UserError, match="process 1 cannot read its data"):
        next(batches)
    batches.close()


def test_closing_after_the_start_of_a_thread_was_interrupted():
    def closed_with(close) -> None:
        batches = object.__new__(FeedIterator)
        batches._iterators = {0: types.SimpleNamespace(close=close)}
        batches.close()

    closed_with(threading.Thread().join)  # as grain does it
    with pytest.raises(RuntimeError, match="another"):
        closed_with(unittest.mock.Mock(side_effect=RuntimeError("another")))
