"""Which waiting prompts are prefilled together, and how many tokens; without a model."""

import random

import numpy as np
import pytest

from vl2jax.inference.admission import WaitingQueue
from vl2jax.inference.completion import Completion
from vl2jax.inference.prefix_cache import LEAST, Prefix, PrefixCache
from vl2jax.inference.sequence import BLOCK, Prompt, Sequence, block_hashes, common_blocks
from vl2jax.processing.batch import FIRST_TILE_ROW, TEXT

TOKENS_PER_TILE = 64


class CountingPrompt(Prompt):
    """A prompt that counts how often its keys are made or read."""

    reads = 0

    @property
    def keys(self):
        CountingPrompt.reads += 1
        return super().keys


def prompt(*parts: int | list[int], kind=Prompt) -> Prompt:
    """A prompt of texts (lists of ids) and images (numbers, from which their pixels are made)."""
    tokens, index, tiles = [], [], []
    for part in parts:
        if isinstance(part, list):
            tokens += part
            index += [TEXT] * len(part)
        else:
            first = FIRST_TILE_ROW + len(tiles) * TOKENS_PER_TILE
            tokens += [1] * TOKENS_PER_TILE
            index += range(first, first + TOKENS_PER_TILE)
            tiles.append(np.full((2, 2, 3), part, np.uint8))
    pixels = np.array(tiles, np.uint8).reshape(-1, 2, 2, 3)
    return kind(np.int32(tokens), np.int32(index), pixels, TOKENS_PER_TILE)


def text(length: int, start: int) -> list[int]:
    return list(range(start, start + length))


def prefilled(prompts: list[Prompt], places: int) -> tuple[int, int]:
    """Admits all prompts like the engine; returns the prefilled tokens and the prefills."""
    rows = [Sequence(Completion(None, (), (), 4), one, 0, 0.0) for one in prompts]
    queue, cache = WaitingQueue(iter(rows), 4 * places), PrefixCache()
    total, groups, admitted = 0, 0, []
    while True:
        queue.refill()
        if not queue:
            assert sorted(map(id, admitted)) == sorted(map(id, rows))
            return total, groups
        group = queue.take(cache, places)
        assert 1 <= len(group.rows) <= places
        for row in group.rows:
            assert group.common < len(row.prompt)
            if group.prefix is not None:
                assert group.prefix.common_length(row.prompt) >= group.common
        total += sum(len(row.prompt) - group.common for row in group.rows)
        groups += 1
        admitted += group.rows
        if group.keep:
            cache.add(Prefix(group.rows[0].prompt.blocks, {}))


def test_hashes_tell_beginnings():
    keys = np.arange(100, dtype=np.uint64)
    hashes = block_hashes(keys)
    assert len(hashes) == 100 // BLOCK and len(set(hashes)) == len(hashes)
    for at in (0, 15, 16, 50, 95, 99):
        other = keys.copy()
        other[at] = 1000
        assert common_blocks(hashes, block_hashes(other)) == min(at // BLOCK, len(hashes))
    assert common_blocks(hashes, block_hashes(keys[:40])) == 2
    assert common_blocks(hashes, block_hashes(keys[16:])) == 0


def test_images_are_known_by_their_pixels():
    """Equal pixels in other arrays share a prefix; other pixels do not."""
    system, question = text(32, 100), text(8, 500)
    a, again, b = (prompt(system, image, question) for image in (1, 1, 2))
    assert a.tiles is not again.tiles
    assert a.blocks == again.blocks
    assert common_blocks(a.blocks, b.blocks) == 32 // BLOCK


def questions(system: int, order: str) -> list[Prompt]:
    """Eight questions about each of eight images, after a shared text of `system` tokens."""
    pairs = [(image, question) for image in range(8) for question in range(8)]
    if order == "interleaved":
        pairs.sort(key=lambda pair: pair[1])
    elif order == "shuffled":
        random.Random(0).shuffle(pairs)
    shared = text(system, 100)
    return [prompt(shared, image, image, text(9, 1000 + 10 * one)) for image, one in pairs]


@pytest.mark.parametrize(
    ("order", "places"),  # 8 places read only 32 prompts ahead, not all questions about an image
    [("by image", 8), ("by image", 64), ("interleaved", 64), ("shuffled", 64)],
)
@pytest.mark.parametrize("system", [0, 32, 48])
def test_shared_text_does_not_hide_shared_images(system, order, places):
    """Each image is prefilled once, the text in front of all once, and each question once.

    A question has 9 tokens; 2 images are 8 whole blocks.
    """
    total, _ = prefilled(questions(system, order), places)
    assert total == system + 8 * 2 * TOKENS_PER_TILE + 64 * 9


def test_prompts_read_too_far_ahead_share_less_but_never_nothing():
    alone = sum(len(one) for one in questions(32, "interleaved"))
    for order in ("interleaved", "shuffled"):
        total, _ = prefilled(questions(32, order), 8)
        assert total < alone / 2


def test_prompts_without_a_shared_beginning_are_prefilled_together():
    prompts = [prompt(text(60, 1000 * i)) for i in range(8)]
    assert prefilled(prompts, 8) == (480, 1)
    # A shared beginning that is too short to matter does not separate them.
    prompts = [prompt(text(LEAST - 1, 5), text(20, 1000 * (i + 1))) for i in range(8)]
    assert prefilled(prompts, 8)[1] == 1


def test_equal_prompts_are_prefilled_once():
    """All but the last tokens come from the first one's cache."""
    total, groups = prefilled([prompt(text(100, 1))] * 8, 8)
    assert (total, groups) == (100 + 7 * (100 - 96), 2)


def test_nested_beginnings():
    """Text, then an image, then a longer shared question: each level is prefilled once."""
    system = text(32, 1)
    prompts = [
        prompt(system, image, text(32, 100 * (kind + 1)), text(5, 1000 + one))
        for image in range(3)
        for kind in range(2)
        for one in range(3)
    ]
    total, _ = prefilled(prompts, 32)
    assert total == 32 + 3 * 64 + 6 * 32 + 18 * 5


def test_a_search_does_not_compare_requests():
    """The keys of a prompt are hashed once, however many wait and however often places refill."""
    CountingPrompt.reads = 0
    shared = text(64, 100)
    prompts = [prompt(shared, text(40, 1000 * i), kind=CountingPrompt) for i in range(600)]
    rows = [Sequence(Completion(None, (), (), 4), one, 0, 0.0) for one in prompts]
    queue, cache = WaitingQueue(iter(rows), 512), PrefixCache()
    while queue.refill() or queue:
        group = queue.take(cache, 1)
        if group.keep:
            cache.add(Prefix(group.rows[0].prompt.blocks, {}))
    assert CountingPrompt.reads == 600


def test_the_first_in_the_queue_is_not_overtaken_for_ever():
    """A prompt that shares nothing is admitted although later ones share an image all the time."""
    rows = iter(
        Sequence(Completion(None, (), (), 4), one, 0, 0.0)
        for one in [
            *(prompt(1, text(5, 10 * i)) for i in range(3)),
            prompt(text(50, 7)),
            *(prompt(1, text(5, 10 * i)) for i in range(3, 300)),
        ]
    )
    queue, cache, taken = WaitingQueue(rows, 8), PrefixCache(), []
    while len(taken) < 20:
        queue.refill()
        group = queue.take(cache, 1)
        if group.keep:
            cache.add(Prefix(group.rows[0].prompt.blocks, {}))
        taken += [len(row.prompt) for row in group.rows]
    assert 50 in taken
