"""Batches depend on the numbers of data shards and pools, not on the mesh; tiles are balanced."""

import types

import jax
import numpy as np
import pytest

from vl2jax.common.errors import UserError
from vl2jax.data.packing import BatchShape
from vl2jax.data.pipeline import make_pipeline
from vl2jax.parallel.sharding import make_mesh
from vl2jax.processing.batch import FIRST_TILE_ROW
from vl2jax.processing.processor import Processor
from vl2jax.synthetic import Synthetic
from vl2jax.synthetic.tokens import write_processor_files
from vl2jax.training.feed import Feed, choose_pools, fill_metrics
from vl2jax.training.run_config import BatchConfig


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from configs import tiny

    path = tmp_path_factory.mktemp("processor")
    write_processor_files(path, tiny.architecture())
    return Processor.from_dir(path, tiny.architecture())


def feed(processor, pools: int, shards: int, **axes) -> Feed:
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | axes)
    shape = BatchShape(2 * pools // shards, 1, 320, 8, 4)  # two microbatches

    def pipeline(shard: int):
        sources = [(Synthetic("train", seed=0), 1.0)]
        split = dict(process_index=shard, process_count=shards)
        return make_pipeline(sources, processor, shape, mask_prompt=True, seed=0, **split)

    return Feed(mesh, pools, shards, pipeline)


def take(feed: Feed, count: int, state=None):
    """Takes `count` batches; returns them as NumPy arrays, with their metrics and the new state."""
    iterator = iter(feed)
    if state is not None:
        iterator.set_state(state)
    found = [next(iterator) for _ in range(count)]
    state = iterator.get_state()
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
