"""Generation: greedy tokens equal those of the original; streaming, sampling and limits."""

import dataclasses

import jax
import numpy as np
import pytest
from golden import Mini, assert_close, minis

import vl2jax
from vl2jax.common.errors import UserError
from vl2jax.model.decoder import init_caches
from vl2jax.model.moe import expert_stacks
from vl2jax.model.vl2 import VL2

CASES = ("text_only", "one_image", "two_images", "three_images", "batch_leftpad")
NEW = 24


@dataclasses.dataclass
class Rows:
    """All generation cases of a mini checkpoint as rows of one batch."""

    model: Mini
    samples: list
    owners: list[tuple[str, int]]  # case and row of the case

    @property
    def batch(self):
        return self.model.processor.collate(self.samples)

    def golden(self, run: str) -> list[list[int]]:
        runs = {case: self.model.case(case)["generate"] for case, _ in self.owners}
        return [runs[case][run]["tokens"][row] for case, row in self.owners]

    def generate(self, batch=None, **options) -> list[list[int]]:
        options = {"max_new_tokens": NEW} | options
        batch = self.batch if batch is None else batch
        answers = vl2jax.generate(self.model.config, self.model.params, batch, **options)
        return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def rows(mini):
    """`rows(name)` returns the prompts of all cases of a mini checkpoint."""
    found: dict[str, Rows] = {}

    def get(name: str) -> Rows:
        model = mini(name)
        if name not in found:
            result = Rows(model, [], [])
            for case in CASES:
                for row, sample in enumerate(model.case(case)["samples"]):
                    images = model.images(sample)
                    result.samples.append(
                        model.processor.sample(sample["conversation"], images, exif=False)
                    )
                    result.owners.append((case, row))
            found[name] = result
        return found[name]

    return get


@pytest.mark.parametrize("name", minis())
def test_greedy_tokens_of_the_original(rows, name):
    """In one batch, each case gives the tokens of the original."""
    these = rows(name)
    assert len(these.samples) >= 2
    assert these.generate() == these.golden("vl")
    assert these.generate(repetition_penalty=1.1) == these.golden("vl_rep1.1")
    for case in {case for case, _ in these.owners}:
        stop = these.model.case(case)["generate"]["vl_stop"]
        tokens = these.generate(eos_token_id=stop["eos_token_id"])
        for (owner, row), got in zip(these.owners, tokens, strict=True):
            if owner == case:  # the original pads with the end token after the first
                assert got == stop["tokens"][row][: len(got)]
                assert set(stop["tokens"][row][len(got) :]) <= {stop["eos_token_id"]}


@pytest.mark.parametrize("name", minis())
def test_chunked_prefill(rows, name):
    these = rows(name)
    longest = max(map(len, these.samples))
    sizes = (1, 16, 37, longest - 1, longest, 4096) if name == "mini-small" else (37, longest - 1)
    for chunk_size in sizes:
        assert these.generate(chunk_size=chunk_size) == these.golden("vl"), chunk_size


def test_rows_alone_equal_rows_together(rows):
    these = rows("mini-small")
    want = these.golden("vl")
    for sample, tokens in zip(these.samples, want, strict=True):
        alone = these.model.processor.collate([sample])
        assert these.generate(alone) == [tokens]


@pytest.mark.parametrize("name", ["mini-small", "mini-extra"])
def test_logits_of_the_answer(rows, name):
    """A forward pass over prompt and answer gives the logits of each step of the original."""
    these = rows(name)
    at = these.owners.index(("one_image", 0))
    sample, tokens = these.samples[at], these.golden("vl")[at]
    batch = these.model.processor.collate([sample], length=len(sample) + NEW)
    batch.tokens[0, -NEW:] = tokens
    batch.segment_ids[:] = 1
    logits = vl2jax.forward(these.model.config, these.model.params, batch)
    scores = these.model.arrays("one_image_generate")["vl/scores"]
    assert_close(logits[:, -NEW - 1 : -1], scores, 5e-4, "scores")


def test_streaming_gives_the_same_text(rows):
    these = rows("mini-small")
    tokenizer = these.model.processor.tokenizer
    whole = vl2jax.generate(
        *(these.model.config, these.model.params, these.batch),
        max_new_tokens=NEW,
        tokenizer=tokenizer,
    )
    bursts = list(
        vl2jax.stream(
            *(these.model.config, these.model.params, these.batch),
            max_new_tokens=NEW,
            tokenizer=tokenizer,
        )
    )
    assert len(bursts) > 2
    answers = bursts[-1][0]
    pieces = ["".join(parts) for parts in zip(*(fresh for _, fresh in bursts), strict=True)]
    assert pieces == [answer.text for answer in whole]
    assert [tokenizer.decode(answer.tokens) for answer in whole] == pieces
    assert [row.result().tokens for row in answers] == [answer.tokens for answer in whole]
    assert all(answer.finish_reason == "length" for answer in whole)
    assert all(answer.seconds_to_first_token > 0 for answer in whole)


def test_stop_string_across_tokens(rows):
    """The text ends before the stop string; the tokens end with the one that completes it."""
    these = rows("mini-small")
    tokenizer = these.model.processor.tokenizer
    at = these.owners.index(("text_only", 0))
    tokens = these.golden("vl")[at]
    text = tokenizer.decode(tokens)
    stop = next(text[i : i + 4] for i in range(6, len(text) - 4) if "�" not in text[i : i + 4])
    count = next(n for n in range(1, NEW) if stop in tokenizer.decode(tokens[:n]))
    batch = these.model.processor.collate([these.samples[at]])
    (answer,) = vl2jax.generate(
        *(these.model.config, these.model.params, batch),
        max_new_tokens=NEW,
        tokenizer=tokenizer,
        stop=["never", stop],
    )
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]
    assert answer.tokens == tokens[:count]


def test_a_seed_repeats_and_rows_are_independent(rows):
    these = rows("mini-small")
    sampled = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}
    together = these.generate(**sampled, seed=5)
    assert these.generate(**sampled, seed=5) == together
    assert these.generate(**sampled, seed=6) != together
    assert together != these.golden("vl")
    alone = these.model.processor.collate(these.samples[:1])
    assert these.generate(alone, **sampled, seed=5) == together[:1]
    seeds = list(range(5, 5 + len(these.samples)))
    assert these.generate(**sampled, seed=seeds)[0] == together[0]


def test_answers_end_at_the_last_position(rows):
    these = rows("mini-small")
    sample = these.samples[0]
    config = these.model.config
    limit = dataclasses.replace(config.decoder, max_position_embeddings=len(sample) + 3)
    config = dataclasses.replace(config, decoder=limit)
    batch = these.model.processor.collate([sample])
    (answer,) = vl2jax.generate(config, these.model.params, batch, max_new_tokens=NEW)
    assert answer.tokens == these.golden("vl")[0][:3]
    assert answer.finish_reason == "length"
    limit = dataclasses.replace(limit, max_position_embeddings=len(sample))
    config = dataclasses.replace(config, decoder=limit)
    with pytest.raises(UserError, match="max_position_embeddings"):
        vl2jax.generate(config, these.model.params, batch)


def test_bfloat16_answers(rows):
    """With bfloat16 weights the first token is the same, and the answer has the same length."""
    these = rows("mini-small")
    params = jax.tree.map(lambda x: x.astype("bfloat16"), these.model.params)
    batch = these.model.processor.collate(these.samples[:1])
    (answer,) = vl2jax.generate(these.model.config, params, batch, max_new_tokens=4)
    assert len(answer.tokens) == 4
    assert answer.tokens[0] == these.golden("vl")[0][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"stop": ["x"]}, "tokenizer"),
        ({"stop": "x"}, "tokenizer"),
        ({"stop": ["x", ""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": b"x"}, "stop"),
        ({"top_p": 2.0}, "top_p"),
        ({"seed": [1, 2, 3]}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 10**5000}, "seed"),
        ({"seed": [1, 0.5]}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"n": 0, "temperature": 1.0}, "n must"),
        ({"n": 10**9, "temperature": 1.0}, "n must"),
        ({"n": 2}, "temperature"),
        ({"dtype": "float16"}, "dtype must"),
        ({"cache_dtype": "int8"}, "cache_dtype must"),
        ({"cache_dtype": np.float64}, "cache_dtype must"),
        ({"cache_dtype": "no dtype"}, "cache_dtype must"),
        ({"cache_dtype": 3}, "cache_dtype must"),
    ],
)
@pytest.mark.parametrize("count", [2, 0])
def test_bad_options(rows, options, words, count):
    """They are found when `stream` is called, before its first answer, and without rows, too."""
    these = rows("mini-small")
    batch = these.model.processor.collate(these.samples[:2])
    batch = jax.tree.map(lambda field: field[:count], batch)
    with pytest.raises(UserError, match=words) as caught:
        vl2jax.stream(these.model.config, these.model.params, batch, **options)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_numbers_of_numpy(rows):
    these = rows("mini-small")
    batch = these.model.processor.collate(these.samples[:2])
    tokens = these.generate(
        batch,
        max_new_tokens=np.int64(3),
        seed=np.array([1, 2]),
        eos_token_id=np.int32(these.golden("vl")[0][1]),
        batch_size=np.uint8(1),
        chunk_size=np.int16(16),
        temperature=np.float32(0),
        n=np.int64(1),
    )
    assert tokens == [these.golden("vl")[0][:2], these.golden("vl")[1][:3]]


def test_no_prompts(rows):
    these = rows("mini-small")
    batch = jax.tree.map(lambda field: field[:0], these.batch)
    assert vl2jax.generate(these.model.config, these.model.params, batch) == []
    assert list(vl2jax.stream(these.model.config, these.model.params, batch)) == []


def test_rows_enter_the_device_when_others_are_finished(rows):
    """At most `batch_size` answers are being generated, whatever the number of rows."""
    these = rows("mini-small")
    batch, most = these.batch, 0
    for sequences, _ in vl2jax.stream(
        *(these.model.config, these.model.params, batch), max_new_tokens=5, batch_size=2
    ):
        most = max(most, sum(bool(s.answer.tokens) and not s.done for s in sequences))
    assert most == 2 < len(these.samples)
    assert [s.answer.tokens for s in sequences] == [tokens[:5] for tokens in these.golden("vl")]


@pytest.mark.usefixtures("quick_compilation")
def test_several_answers_from_one_seed(rows):
    """They differ, repeat with the seed, and do not depend on their number or on other rows."""
    these = rows("mini-small")
    sampled = {"temperature": 1.0, "max_new_tokens": 6, "batch_size": 2}
    batch = these.model.processor.collate(these.samples[:2])
    two = these.generate(batch, **sampled, seed=[7, 8], n=2)
    assert len(two) == len(set(map(tuple, two))) == 4
    alone = these.model.processor.collate(these.samples[:1])
    three = these.generate(alone, **sampled, seed=7, n=3)
    assert three[:2] == two[:2] and three[2] not in two


@pytest.mark.usefixtures("quick_compilation")
def test_seeds_of_64_bits(rows):
    """Both halves of a seed count; a negative seed is one, too."""
    these = rows("mini-small")
    sample = these.samples[0]
    seeds = [7, 7 + 2**32, 7 + 2**33, -1, -(2**63), 2**63 - 1, 7]
    batch = these.model.processor.collate([sample] * len(seeds))
    found = these.generate(batch, temperature=1.0, max_new_tokens=6, batch_size=2, seed=seeds)
    assert found[0] == found[-1]
    assert len(set(map(tuple, found))) == len(seeds) - 1


def test_one_stop_string(rows):
    """A text is one stop string, not one per letter."""
    these = rows("mini-small")
    tokenizer = these.model.processor.tokenizer
    batch = these.model.processor.collate(these.samples[:1])
    text = tokenizer.decode(these.golden("vl")[0])
    stop = text[-8:-3]
    options = dict(max_new_tokens=NEW, tokenizer=tokenizer)
    found = [
        vl2jax.generate(these.model.config, these.model.params, batch, **options, stop=given)[0]
        for given in (stop, [stop], None)
    ]
    assert found[0].text == found[1].text == text[: text.index(stop)]
    assert found[2].text == text


def test_left_padding_is_refused(rows):
    these = rows("mini-small")
    batch = these.batch
    flipped = batch.replace(segment_ids=np.ascontiguousarray(batch.segment_ids[:, ::-1]))
    with pytest.raises(UserError, match="padded on the right"):
        these.generate(flipped)


@pytest.mark.usefixtures("quick_compilation")
def test_expert_stacks_change_nothing(rows):
    """Expert weights as one stack for all layers give the same as weights sliced per layer."""
    these = rows("mini-extra")  # experts in two runs of layers
    config = these.model.config
    cfg, model = config.decoder, VL2(config)
    x = jax.random.normal(jax.random.key(0), (2, 5, cfg.hidden_size))
    positions = np.tile(np.arange(5), (2, 1))
    found = []
    for variables in (these.model.params, expert_stacks(these.model.params)):
        caches = init_caches(cfg, 2, 8, x.dtype)
        hidden, _ = model.apply(variables, x, positions, caches, method=VL2.decode)
        found.append(hidden)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert "experts" not in expert_stacks(these.model.params)["params"]["decoder"]["moe_2"]["mlp"]
