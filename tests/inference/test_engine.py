"""Continuous batching: in any mix of requests, each gives the tokens of the original."""

import dataclasses
import os
import random

import jax
import numpy as np
import PIL.Image
import pytest

from vl2jax.common.errors import UserError
from vl2jax.inference.completion import Completion
from vl2jax.inference.engine import Engine
from vl2jax.inference.sampling import SamplingParams
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


def _image_questions(model) -> list[Prompt]:
    """Three questions about each of three groups of images, after one text."""
    size, processor = model.config.tokens_per_tile, model.processor
    dice, prompts = np.random.default_rng(0), []
    groups = [
        [PIL.Image.fromarray(dice.integers(0, 256, (30, 30, 3), np.uint8)) for _ in range(4)]
        for _ in range(3)
    ]
    for question in ("a f(x)", "no or", "you"):
        for images in groups:
            asked = [
                {"role": "system", "content": "OCR see | 图片里有什么 a f(x): no or you" * 2},
                {"role": "user", "content": f"{'<image>' * 4}{question}"},
            ]
            one = processor.sample(asked, images)
            prompts.append(Prompt(one.tokens, one.image_index, one.tiles, size))
    return prompts


def test_a_shared_text_does_not_hide_shared_images(asked):
    """Prefilled once each: the text in front of all, the images of each group, each question."""
    model, *_ = asked
    prompts = _image_questions(model)
    text = next(i for i, index in enumerate(prompts[0].image_index) if index != -1)
    images = int((prompts[0].image_index != -1).sum())
    assert text >= 32 and images >= 48
    engine = Engine(model.config, model.params, rows=4)
    rows, _ = answers(engine, prompts, [3] * 9)
    tails = sum(len(prompt) - text - images for prompt in prompts)
    # Whole blocks of 16 tokens are shared: up to 15 more tokens for each prompt.
    assert engine.prefilled_tokens <= text + 3 * images + tails + 8 * 15
    for prompt, row in zip(prompts[-2:], rows[-2:], strict=True):
        alone, _ = answers(Engine(model.config, model.params, rows=1), [prompt], [3])
        assert row.answer.tokens == alone[0].answer.tokens


def _slots(engine) -> int:
    return 0 if engine._state is None else jax.tree.leaves(engine._state.caches)[0].shape[-2]


def test_slots_shrink_and_grow_while_rows_are_active(asked):
    """A long row ends while others go on, and another one enters: the caches follow.

    Old arrays are freed one by one, so they never exist as a whole beside the new ones.
    """
    model, prompts, golden = asked
    short = next(i for i, prompt in enumerate(prompts) if len(prompt) <= 40)
    long, stop = next(
        (i, golden[i][2])
        for i in range(len(prompts))
        if golden[i][2] not in golden[short] + golden[i][:2] and len(prompts[i]) <= 64
    )
    engine = Engine(model.config, model.params, rows=2, eos_token_id=stop)
    last = next(i for i in range(len(prompts)) if i not in (short, long))
    chosen, news = [long, *[short] * 9, last], [400, NEW, *[2] * 8, 400]
    rows = [engine.row(prompts[i], new) for i, new in zip(chosen, news, strict=True)]
    resized, real, slots = [], engine.steps.resize, []

    def resize(array, *sizes):
        assert all(old.is_deleted() for old in resized)
        resized.append(array)
        return real(array, *sizes)

    engine.steps = dataclasses.replace(engine.steps, resize=resize)
    for _ in engine.run(iter(rows)):
        slots.append(jax.tree.leaves(engine._state.caches)[0].shape[-2])
        if 64 in slots and slots[-1] == 512:
            break  # the last row has entered
    assert not rows[1].done
    changes = [size for i, size in enumerate(slots) if slots[i - 1 : i] != [size]]
    assert changes == [512, 64, 512]
    assert len(resized) == 2 * len(jax.tree.leaves(engine.steps.caches(1, 64)))
    assert rows[0].answer.tokens == golden[long][:3]
    for row in rows[1:10]:
        assert row.answer.tokens == golden[short][: len(row.answer.tokens)]


def test_large_buffers_are_donated(asked):
    """Decoding and insertion write the caches in place; the first tokens need no caches."""
    model, *_ = asked
    engine = Engine(model.config, model.params)
    steps, sampling, vocab = engine.steps, SamplingParams.create(), model.config.decoder.vocab_size
    state = jax.eval_shape(lambda: steps.empty_state(4, 64))
    last = jax.ShapeDtypeStruct((2, model.config.decoder.hidden_size), engine.dtype)
    rows = (np.zeros((2, vocab), bool), np.ones(2, np.int32), np.zeros((2, 2), np.uint32))
    first = jax.eval_shape(steps.begin, model.params, sampling, last, *rows, np.ones(2, bool))
    assert first.caches is None
    caches = jax.eval_shape(lambda: steps.caches(2, 128))
    numbers = np.arange(2, dtype=np.int32)
    programs = {
        "insert": steps.insert.lower(state, first, caches, numbers),
        "burst": steps.burst.lower(model.params, sampling, state, numbers, 4, 0),
    }
    wanted = len(jax.tree.leaves(state))
    for name, lowered in programs.items():
        (header,) = [
            line for line in lowered.compile().as_text().splitlines() if "HloModule" in line
        ]
        assert header.count("-alias") >= wanted, (name, header)


def _poisoned(params, token: int):
    """Parameters whose embedding of one token is not a number."""
    poison = jax.tree.map(lambda leaf: leaf, params)
    table = poison["params"]["decoder"]["embed_tokens"]["embedding"]
    poison["params"]["decoder"]["embed_tokens"]["embedding"] = table.at[token].set(np.nan)
    return poison


def test_logits_that_are_not_finite_end_a_row_and_no_other(asked):
    """At the prompt and in the middle of an answer; rows that come later get sound caches."""
    model, prompts, golden = asked
    tokenizer = model.processor.tokenizer
    token = next(
        token
        for token in golden[0][3:9]
        if all(token not in other[:-1] for other in golden[1:])
        and not any(token in prompt.tokens for prompt in prompts)
        and token not in golden[0][:3]
    )
    bad = Prompt(
        np.append(prompts[1].tokens, np.int32(token)),
        np.append(prompts[1].image_index, np.int32(-1)),
        prompts[1].tiles,
        prompts[1].tokens_per_tile,
    )
    params = _poisoned(model.params, token)
    engine = Engine(model.config, params, rows=4, tokenizer=tokenizer)
    rows, texts = answers(engine, [prompts[0], bad, bad, *prompts[1:], bad, prompts[1]])
    cut = golden[0].index(token) + 1
    for row, tokens in ((rows[0], golden[0][:cut]), (rows[1], []), (rows[2], []), (rows[-2], [])):
        result = row.result()
        assert result.finish_reason == "error" and result.tokens == tokens
        assert "not finite" in result.error and "\n" not in result.error
    assert texts[0] == rows[0].answer.text == tokenizer.decode(golden[0][:cut])
    for row, tokens in zip([*rows[3:-2], rows[-1]], [*golden[1:], golden[1]], strict=True):
        assert row.answer.tokens == tokens
        assert row.result().error is None and row.answer.finish_reason == "length"
