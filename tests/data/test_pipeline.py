"""Tests of the data pipeline: it resumes exactly, and raises or skips malformed rows."""

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError
from vl2jax.data.packing import BatchShape
from vl2jax.data.pipeline import make_pipeline
from vl2jax.data.row import Row
from vl2jax.data.unread import UnreadKeys

SHAPE = BatchShape(pools=2, rows=2, length=160, tiles=12, segments=8)
LARGE = BatchShape(pools=2, rows=4, length=320, tiles=60, segments=99)


@dataclasses.dataclass
class Rows:
    """A source of documents, and conversations with 0 to 2 images; rows in `bad` are malformed."""

    name: str
    count: int
    bad: tuple = ()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        where = f"{self.name}:{index}"
        if index in self.bad:
            raise UserError(f"{where}: unknown role 'robot'")
        if index % 7 == 6:
            return Row(text=f"Document {index} of {self.name}. " * 2, where=where)
        colour = (index % 256, index // 256 % 256, 90)
        images = [PIL.Image.new("RGB", (60 + 20 * i, 60), colour) for i in range(index % 3)]
        turns = [
            {"role": "user", "content": "<image>" * len(images) + f"Which is {index}?"},
            {"role": "assistant", "content": f"{self.name} " * (1 + index % 5)},
        ]
        return Row(messages=turns, images=images, where=where)


def start(sources, processor, shape=SHAPE, **options):
    options = {"mask_prompt": True, "seed": 3} | options
    if not isinstance(sources, list):
        sources = [(sources, 1.0)]
    return iter(make_pipeline(sources, processor, shape, **options))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(first, second):
    assert first.names == second.names
    np.testing.assert_array_equal(first.rows, second.rows)
    for field in ("tiles", "tokens", "image_index", "positions", "segment_ids", "loss_mask"):
        a, b = getattr(first.batch, field), getattr(second.batch, field)
        np.testing.assert_array_equal(a, b, err_msg=field, strict=True)


def names(batches):
    return [name for batch in batches for name in batch.names]


def test_one_batch(processor):
    batches = start(Rows("a", 50), processor)
    packed = next(batches)
    batch = packed.batch
    assert batch.tiles.shape == (2, 12, 56, 56, 3) and batch.tokens.shape == (2, 2, 160)
    assert packed.samples == len(packed.rows) == len(packed.names) == len(set(packed.names))
    assert packed.samples == batch.segment_ids.max(axis=-1).sum()
    assert packed.tokens == (batch.segment_ids > 0).sum()
    assert packed.tiles == len(np.unique(np.argwhere(batch.tiles.any((2, 3, 4))), axis=0))
    # Each image has one separator, index 1.
    assert packed.images == (batch.image_index == 1).sum() > 0
    assert 0 < packed.supervised < packed.tokens
    assert (packed.pool_counts[:, 0] == (batch.segment_ids > 0).sum(axis=(1, 2))).all()
    whole = [packed.tokens, packed.images, packed.tiles, packed.supervised]
    assert packed.pool_counts.sum(axis=0)[:4].tolist() == whole
    batches.close()


def test_supervised_is_what_the_loss_counts(processor):
    from vl2jax.model.losses import shift_targets

    batches = start(Rows("a", 50), processor)
    packed = next(batches)
    pools = [type(packed.batch)(**{k: v[p] for k, v in vars(packed.batch).items()}) for p in (0, 1)]
    assert packed.supervised == sum(int(shift_targets(pool)[1].sum()) for pool in pools)
    batches.close()


def test_each_epoch_has_every_row_once_in_another_order(processor):
    batches = start(Rows("a", 40), processor)
    # By position in the data order, because waiting samples come later.
    seen = {
        int(n): name for b in take(batches, 30) for n, name in zip(b.rows, b.names, strict=True)
    }
    epochs = [[seen[i] for i in range(40 * e, 40 * e + 40)] for e in range(3)]
    expected = sorted(f"a:{i}" for i in range(40))
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != expected
    batches.close()


def test_the_seed_decides_the_order(processor):
    orders = []
    for seed in (3, 3, 4):
        sources = [(Rows("a", 40), 0.5), (Rows("b", 40), 0.5)]
        batches = start(sources, processor, shape=LARGE, seed=seed)
        orders.append(names(take(batches, 1)))
        batches.close()
    assert orders[0] == orders[1] and set(orders[0]) != set(orders[2])
    # Sources of the same length are shuffled differently.
    first = {s: {n[2:] for n in orders[0] if n.startswith(s)} for s in "ab"}
    assert first["a"] != first["b"]


def test_evaluation_ends(processor):
    sources = [(Rows("a", 40), 1.0), (Rows("b", 5), 7.0)]
    expected = [f"a:{i}" for i in range(40)] + [f"b:{i}" for i in range(5)]
    for shuffle in (False, True):
        batches = list(start(sources, processor, repeat=False, shuffle=shuffle))
        assert sorted(names(batches)) == sorted(expected)
        numbers = [n for b in batches for n in b.rows]
        assert sorted(numbers) == list(range(45))
        in_order = [name for _, name in sorted(zip(numbers, names(batches), strict=True))]
        assert (in_order == expected) is not shuffle
        assert batches[-1].tokens < batches[0].tokens


OPTIONS = {
    "plain": {},
    "in order": {"shuffle": False},
    "threads": {"threads": 4, "prefetch": 5},
    "no prefetch": {"prefetch": 0, "threads": 1},
    "second process": {"process_index": 1, "process_count": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_resume_is_exact(processor, options):
    sources = [(Rows("a", 30, bad=(3, 20)), 0.7), (Rows("b", 11, bad=(5,)), 0.3)]
    options = options | {"on_error": "skip"}
    batches = start(sources, processor, **options)
    states, whole = [json.dumps(batches.get_state())], []
    for _ in range(9):
        whole.append(next(batches))
        states.append(json.dumps(batches.get_state()))
    assert max(map(len, states)) < 1000
    assert any(json.loads(state)["waiting"] for state in states)
    batches.close()
    # Resumes also with other numbers of threads and prefetched batches.
    for step, changes in ((0, {}), (1, {"threads": 3, "prefetch": 1}), (4, {}), (7, {})):
        resumed = start(sources, processor, **options | changes)
        if step == 4:
            next(resumed)  # `set_state` also works after the first batch
        resumed.set_state(json.loads(states[step]))
        assert json.dumps(resumed.get_state()) == states[step]
        for expected in whole[step : step + 2]:
            assert_equal(next(resumed), expected)
        resumed.close()


def test_resume_at_the_end(processor):
    batches = start(Rows("a", 40, bad=(39,)), processor, repeat=False, on_error="skip")
    whole, states = [], [batches.get_state()]
    for batch in batches:
        whole.append(batch)
        states.append(batches.get_state())
    assert len(whole) > 2
    for step, state in enumerate(states):
        resumed = start(Rows("a", 40, bad=(39,)), processor, repeat=False, on_error="skip")
        resumed.set_state(state)
        rest = list(resumed)
        assert len(rest) == len(whole) - step
        for first, second in zip(rest, whole[step:], strict=True):
            assert_equal(first, second)


def test_a_state_of_other_data_is_refused(processor):
    batches = start(Rows("a", 40), processor)
    next(batches)
    state = batches.get_state()
    batches.close()
    for sources, options, message in (
        (Rows("a", 40), {"seed": 4}, "seed was 3, now 4"),
        (Rows("a", 41), {}, r"rows was \[40\], now \[41\]"),
        ([(Rows("a", 40), 2.0)], {}, r"weights was \[1.0\], now \[2.0\]"),
        (Rows("a", 40), {"shuffle": False}, "shuffle was True, now False"),
        (Rows("a", 40), {"process_count": 2}, r"process was \[0, 1\], now \[0, 2\]"),
    ):
        other = start(sources, processor, **options)
        with pytest.raises(UserError, match=message):
            other.set_state(state)
    shorter = dataclasses.replace(SHAPE, length=20)
    other = start(Rows("a", 40), processor, shape=shorter)
    with pytest.raises(UserError, match=r"config\.batch\.length.*when the checkpoint was saved"):
        other.set_state(state | {"waiting": [0, 1, 2, 3, 4]})


def test_weights_are_honoured(processor):
    sources = [(Rows("a", 100), 0.7), (Rows("b", 1000), 0.3)]
    batches = start(sources, processor, shape=LARGE)
    seen = names(take(batches, 14))
    share = np.mean([name.startswith("a:") for name in seen])
    assert len(seen) > 400 and abs(share - 0.7) < 0.03
    batches.close()


def test_processes_share_the_rows_and_see_the_same_mixture(processor):
    sources = [(Rows("a", 60), 0.5), (Rows("b", 60), 0.5)]
    seen = {}
    for process in (0, 1):
        options = {"process_index": process, "process_count": 2}
        batches = start(sources, processor, shape=LARGE, **options)
        packed = take(batches, 4)
        numbers = {n: name for b in packed for n, name in zip(b.rows, b.names, strict=True)}
        batches.close()
        assert all(number % 2 == process for number in numbers)
        first = [numbers[n] for n in sorted(numbers)[:60]]  # this process's first epoch
        assert sum(name.startswith("a:") for name in first) == 30
        seen[process] = first
    assert sorted(seen[0] + seen[1]) == sorted(f"{s}:{i}" for s in "ab" for i in range(60))


def test_skipped_rows_are_told_once(processor):
    messages = []
    source = Rows("a", 20, bad=(2, 5, 11))
    batches = start(source, processor, on_error="skip", on_skip=messages.append)
    seen = names(take(batches, 12))  # several epochs
    batches.close()
    assert len(seen) > 60 and set(seen) == {f"a:{i}" for i in range(20) if i not in source.bad}
    assert sorted(messages) == [f"a:{i}: unknown role 'robot'" for i in (11, 2, 5)]


@pytest.mark.parametrize("options", [{}, {"threads": 4}, {"prefetch": 0}])
def test_errors_reach_the_consumer(processor, options):
    batches = start(Rows("a", 40, bad=(33,)), processor, repeat=False, shuffle=False, **options)
    with pytest.raises(UserError, match="a:33: unknown role 'robot'"):
        list(batches)
    batches.close()


def test_rows_too_large_are_malformed(processor):
    shape = dataclasses.replace(SHAPE, length=60, tiles=5)
    with pytest.raises(UserError, match=r"^a:\d+: .* (config\.batch\.(length|tiles)) to \d+"):
        list(start(Rows("a", 40), processor, shape=shape, repeat=False))
    messages = []
    options = {"repeat": False, "on_error": "skip", "on_skip": messages.append}
    seen = names(start(Rows("a", 40), processor, shape=shape, **options))
    assert messages and seen and len(messages) + len(seen) == 40


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_rows_too_large_are_skipped_or_truncated(processor, on_error):
    shape = dataclasses.replace(SHAPE, length=18)
    options = {"shape": shape, "repeat": False, "on_error": on_error, "max_skipped": 1}
    messages = []
    skipping = start(Rows("a", 40), processor, too_long="skip", on_skip=messages.append, **options)
    skipped = list(skipping)
    read, dropped, too_long, truncated = skipped[-1].pool_counts.sum(axis=0)[4:8].tolist()
    assert (read, truncated) == (40, 0) and dropped == too_long == len(messages) > 3
    batches = list(start(Rows("a", 40), processor, too_long="truncate", **options))
    read, dropped, too_long, truncated = batches[-1].pool_counts.sum(axis=0)[4:8].tolist()
    assert read == 40 and truncated + dropped == too_long == len(messages) and truncated > 3
    assert set(names(skipped)) < set(names(batches))
    assert all(batch.supervised > 0 for batch in batches)


def test_a_source_of_rows_too_large_ends_the_run(processor):
    shape = dataclasses.replace(SHAPE, length=5)
    with pytest.raises(UserError, match=r"no valid row.*tokens"):
        next(start(Rows("a", 2**20), processor, shape=shape, too_long="skip"))


def test_keys_that_are_not_read_are_said_once(processor):
    class Odd(Rows):
        def __getitem__(self, index):
            keys = ("mood", f"key {index}") if index % 2 else ()
            return dataclasses.replace(super().__getitem__(index), unread=keys, file=self.name)

    said = []
    unread = UnreadKeys(said.append)
    for name in ("a.json", "a.json", "b.json"):
        list(start(Odd(name, 400), processor, repeat=False, unread=unread))
    assert sum("'mood'" in text for text in said) == 2
    assert 40 < sum(text.startswith("a.json: the keys [") for text in said) <= 50
    assert all("of rows are not read" in text and len(text) < 200 for text in said)


@pytest.mark.parametrize("repeat", [False, True])
def test_data_without_a_valid_row(processor, repeat):
    bad = Rows("a", 9, bad=range(9))
    with pytest.raises(UserError, match=r"no valid row.*malformed; repair it.*a:\d: unknown role"):
        list(start(bad, processor, on_error="skip", repeat=repeat))
    if repeat:  # also together with a valid source
        both = [(Rows("b", 90), 0.9), (bad, 0.1)]
        with pytest.raises(UserError, match=r"data source 2 has no valid row: the last 51 that"):
            list(start(both, processor, on_error="skip"))
        with pytest.raises(UserError, match=r"data source 2 has no valid row: the last 109"):
            list(start(both, processor, on_error="skip", max_skipped=1))


@pytest.mark.parametrize(("max_skipped", "most"), [(0.5, 51), (0.1, 11), (0.0, 1)])
def test_a_large_source_without_a_valid_row_ends_a_run_early(processor, max_skipped, most):
    """Also if one of many processes reads it."""
    source, told = Rows("a", 2**20, bad=range(2**20)), []
    options = {"on_error": "skip", "max_skipped": max_skipped, "on_skip": told.append}
    batches = start(source, processor, process_index=7, process_count=64, **options)
    with pytest.raises(UserError, match=f"no valid row: the last {most} that were read"):
        next(batches)
    assert len(told) == most
    batches.close()


def test_the_share_of_skipped_rows_is_limited(processor):
    third, options = Rows("a", 999, bad=range(0, 999, 3)), {"on_error": "skip", "shape": LARGE}
    batches = start(third, processor, max_skipped=0.5, **options)
    read, skipped = take(batches, 9)[-1].pool_counts[0, 4:6]
    batches.close()
    assert read > 200 and 0.25 < skipped / read < 0.42
    batches = start(third, processor, max_skipped=0.2, **options)
    limit = r"data source 1: 2\d of the \d+ rows read so far .*config.data.max_skipped 0.2 allows"
    with pytest.raises(UserError, match=limit):
        take(batches, 9)
    batches.close()


def test_counts_of_rows_continue_after_a_restart(processor):
    source = Rows("a", 30, bad=(3, 20))
    batches = start(source, processor, on_error="skip")
    whole = take(batches, 8)
    batches.close()
    counts = [batch.pool_counts.sum(axis=0)[4:].tolist() for batch in whole]
    assert counts[-1][0] > 60 and counts[-1][1] >= 4 and counts[0] < counts[3] < counts[-1]
    batches = start(source, processor, on_error="skip")
    take(batches, 4)
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    resumed = start(source, processor, on_error="skip")
    resumed.set_state(state)
    assert [b.pool_counts.sum(axis=0)[4:].tolist() for b in take(resumed, 4)] == counts[4:]
    del state["rows"]  # as a checkpoint of an older version: counting begins again
    resumed.set_state(state)
    assert next(resumed).pool_counts[0, 4] <= counts[4][0] - counts[3][0]
    resumed.close()


def test_a_single_valid_row_is_enough(processor):
    batches = start(Rows("a", 9, bad=range(8)), processor, on_error="skip", max_skipped=1)
    assert set(names(take(batches, 2))) == {"a:8"}
    batches.close()


def test_an_endless_source_is_shuffled_as_any_other(processor):
    batches = start(Rows("a", 2**40), processor)
    packed = take(batches, 4)
    batches.close()
    drawn = [int(name[2:]) for name in names(packed)]
    assert len(set(drawn)) == len(drawn) and max(drawn) > 2**38
    assert max(max(batch.rows) for batch in packed) < 200


def test_a_source_that_says_so_is_read_in_order(processor):
    rows = Rows("a", 2**40)
    rows.ordered = True
    batches = start(rows, processor)
    packed = take(batches, 3)
    batches.close()
    assert max(int(name[2:]) for name in names(packed)) < 100


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "no data source"),
        ([(Rows("a", 3), 1.0), (Rows("b", 0), 1.0)], {}, "data source 2 is empty"),
        ([(Rows("a", 3), 0.0)], {}, "data source 1 has weight 0.0"),
        ([(Rows("a", 3), float("nan"))], {}, "data source 1 has weight nan"),
        ([(Rows("a", 3), 1.0)], {"on_error": "ignore"}, "on_error is 'ignore', expected"),
        ([(Rows("a", 3), 1.0)], {"max_skipped": 1.5}, "max_skipped is 1.5, expected a share"),
        ([(Rows("a", 3), 1.0)], {"too_long": "cut"}, "too_long is 'cut', expected 'raise', 'skip'"),
        ([(Rows("a", 3), 1.0)], {"threads": 0}, "threads is 0, expected 1 or more"),
        ([(Rows("a", 3), 1.0)], {"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense(processor, sources, options, message):
    with pytest.raises(UserError, match=message):
        start(sources, processor, **options)
