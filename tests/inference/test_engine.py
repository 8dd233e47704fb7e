"""Continuous batching: in any mix of requests, each gives the tokens of the original."""

import os
import random

import jax
import numpy as np
import pytest

from vl2jax.common.errors import UserError
from vl2jax.inference.completion import Completion
from vl2jax.inference.engine import Engine
from vl2jax.inference.sequence import Prompt
from vl2jax.inference.steps import compiled_steps

NEW = 24
CASES = ("text_only", "one_image", "two_images", "three_images", "batch_leftpad")


@pytest.fixture(scope="module")
def asked(mini):
    """The model, the prompts of all golden cases, and the original's greedy tokens for each."""
    model, prompts, golden = mini("mini-small"), [], []
    size = model.config.tokens_per_tile
    for case in CASES:
        samples = model.case(case)["samples"]
        tokens = model.case(case)["generate"]["vl"]["tokens"]
        for sample, want in zip(samples, tokens, strict=True):
            images = model.images(sample)
            one = model.processor.sample(sample["conversation"], images, exif=False)
            prompts.append(Prompt(one.tokens, one.image_index, one.tiles, size))
            golden.append(want)
    return model, prompts, golden


def answers(engine, prompts, news=None):
    """Runs prompts; returns their sequences, and the text that was streamed for each."""
    news = news or [NEW] * len(prompts)
    rows = [engine.row(prompt, new) for prompt, new in zip(prompts, news, strict=True)]
    texts = dict.fromkeys(map(id, rows), "")
    for events in engine.run(iter(rows)):
        for row, fresh in events:
            texts[id(row)] += fresh
    return rows, list(texts.values())


def test_random_mixes(asked):
    """Random lengths, images, batch sizes, limits, end tokens, stop strings and chunk sizes."""
    model, prompts, golden = asked
    tokenizer = model.processor.tokenizer
    for number in range(int(os.environ.get("VL2JAX_MIXES", "4"))):
        dice = random.Random(number)
        chosen = [dice.randrange(len(prompts)) for _ in range(dice.randint(1, 9))]
        news = [dice.choice((1, 2, 7, NEW)) for _ in chosen]
        eos = dice.choice([[], [dice.choice(golden[dice.choice(chosen)])]])
        text = tokenizer.decode(golden[dice.choice(chosen)])
        at = dice.randrange(len(text) - 4)
        stop = dice.choice([(), (), (text[at : at + dice.randint(1, 4)], "never")])
        engine = Engine(
            *(model.config, model.params),
            rows=dice.choice((1, 4)),
            chunk_size=dice.choice((0, 0, 64)),
            tokenizer=tokenizer,
            eos_token_id=eos,
            stop=stop,
        )
        rows, texts = answers(engine, [prompts[i] for i in chosen], news)
        for i, new, row, text in zip(chosen, news, rows, texts, strict=True):
            want = Completion(tokenizer, eos, stop, new)
            want.push(golden[i])
            assert row.answer.tokens == want.tokens, (number, i)
            assert row.answer.finish_reason == want.finish_reason, (number, i)
            assert text == want.text == row.answer.text, (number, i)


def test_long_prompt_joins_first_prefill(asked):
    """A long prompt behind as many short ones as there are batch rows is prefilled with the first.

    One of the short prompts equals another and waits until it can reuse its prefix.
    """
    model, prompts, golden = asked
    long = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    a, b, c = [i for i, prompt in enumerate(prompts) if 32 < len(prompt) <= 62][:3]
    chosen, engine = [a, b, c, b, long], Engine(model.config, model.params, rows=4)
    assert len(prompts[long]) > 64
    rows, _ = answers(engine, [prompts[i] for i in chosen], [2] * 5)
    for i, row in zip(chosen, rows, strict=True):
        assert row.answer.tokens == golden[i][:2]


def test_pictures_and_shared_beginnings_pass_once(asked):
    """For several questions about one image, its tiles are encoded and prefilled only once."""
    model, prompts, _ = asked
    longest = max(prompts, key=lambda prompt: len(prompt) * bool(len(prompt.tiles)))
    assert len(longest) >= 48 and len(longest.tiles)
    questions = []
    for token in range(5, 12):
        tokens = np.append(longest.tokens, np.int32(token))
        index = np.append(longest.image_index, np.int32(-1))
        questions.append(Prompt(tokens, index, longest.tiles, longest.tokens_per_tile))
    engine = Engine(model.config, model.params, rows=4)
    together, _ = answers(engine, questions, [4] * 7)
    assert engine.image_cache.encoded == len(set(longest.digests))
    assert engine.prefilled_tokens < len(longest) + 1 + 6 * (16 + 1)
    for question, row in zip(questions, together, strict=True):
        alone, _ = answers(Engine(model.config, model.params, rows=1), [question], [4])
        assert row.answer.tokens == alone[0].answer.tokens


def test_a_next_turn_prefills_only_what_is_new(asked):
    model, prompts, golden = asked
    at = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    first, more = prompts[at], np.array([7, 8, 9], np.int32)
    tokens = np.concatenate([first.tokens, np.array(golden[at], np.int32), more])
    index = np.pad(first.image_index, (0, len(tokens) - len(first)), constant_values=-1)
    second = Prompt(tokens, index, first.tiles, first.tokens_per_tile)
    engine = Engine(model.config, model.params, rows=1, keep_turns=True)
    answers(engine, [first])
    before = engine.prefilled_tokens
    again, _ = answers(engine, [second], [6])
    assert engine.prefilled_tokens - before < 16 + 4
    fresh, _ = answers(Engine(model.config, model.params, rows=1), [second], [6])
    assert again[0].answer.tokens == fresh[0].answer.tokens


def test_few_programs_compile(asked):
    """Prompts with many lengths and images need only one program per bucket."""
    model, prompts, _ = asked
    compiled_steps.cache_clear()  # so that the counts start at zero
    engine = Engine(model.config, model.params, rows=1)
    text = next(prompt for prompt in prompts if not len(prompt.tiles))
    for length in range(3, 41, 6):  # text only, all in one length bucket
        short = Prompt(text.tokens[:length], text.image_index[:length], text.tiles, 1)
        answers(engine, [short], [2])
    steps = engine.steps
    counted = ("encode", "embed", "prefill", "begin", "burst")
    compiled = {name: getattr(steps, name)._cache_size() for name in counted}
    assert compiled == {"encode": 0, "embed": 1, "prefill": 1, "begin": 1, "burst": 1}
    image_cache = [prompt for prompt in prompts if len(prompt.tiles)]
    for prompt in image_cache:
        answers(engine, [prompt], [2])
    tiles = {len(set(prompt.digests)) for prompt in image_cache}
    assert steps.encode._cache_size() <= len(tiles)
    assert steps.prefill._cache_size() <= 4  # 64, 128, 192, 256 tokens
    assert steps.burst._cache_size() <= 4


def test_finished_sequence_frees_its_row(asked):
    """Seven sequences with different limits go through two batch rows."""
    model, prompts, golden = asked
    engine = Engine(model.config, model.params, rows=2)
    news = [2, 17, 3, 4, 5, 6, 7]
    chosen = [prompts[i % len(prompts)] for i in range(7)]
    rows = [engine.row(prompt, new) for prompt, new in zip(chosen, news, strict=True)]
    busy = [len({id(row) for row, _ in events}) for events in engine.run(rows)]
    assert [len(row.answer.tokens) for row in rows] == news
    assert max(busy) == 2
    for row, new, i in zip(rows, news, range(7), strict=True):
        assert row.answer.tokens == golden[i % len(prompts)][:new]


def test_the_batch_shrinks_when_nobody_waits(asked):
    """After three short answers have finished, a long one continues in a batch of one row."""
    model, prompts, golden = asked
    engine = Engine(model.config, model.params, rows=4)
    sizes, news = [], [2, NEW, 2, 2]
    rows = [engine.row(prompts[i], new) for i, new in enumerate(news)]
    for _ in engine.run(rows):
        sizes.append(jax.tree.leaves(engine._state.caches)[0].shape[1])
    assert max(sizes) == 4
    assert sizes[-1] == 1
    for i, (row, new) in enumerate(zip(rows, news, strict=True)):
        assert row.answer.tokens == golden[i][:new]


def test_no_rows(asked):
    model, *_ = asked
    assert list(Engine(model.config, model.params).run([])) == []
    with pytest.raises(UserError, match="max_new_tokens"):
        Engine(model.config, model.params).row(asked[1][0], 0)
