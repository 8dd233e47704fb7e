"""Answers to prompts, whole or as they come; the device's part is in `decode.py`.

Axis legend: B rows.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vl2jax.ambient import mesh_of
from vl2jax.answer import Answer
from vl2jax.batch import Batch
from vl2jax.config import VL2Config
from vl2jax.decode import BURST, DecodeState, prefill_prompts, programs
from vl2jax.errors import UserError
from vl2jax.model import compute_dtype
from vl2jax.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Generation:
    """One row's answer.

    Attributes:
      tokens: ids after the prompt, the end token included if it came.
      finish_reason: "stop" (end token or stop string) or "length".
      text: the tokens as text without the end token, cut before a stop string; None without a
        tokenizer.
      prompt_tokens: length of the prompt.
      seconds_to_first_token: from the call to the first token, compilation included.
      tokens_per_second: of this row after its first token; 0 if there was only one.
    """

    tokens: list[int]
    finish_reason: str
    text: str | None
    prompt_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float


def generate(config: VL2Config, params, batch: Batch, **options) -> list[Generation]:
    """Answers every row of a batch; a row's answer does not depend on the others.

    Args:
      config: architecture.
      params: variables of the model, as `vl2jax.load` gives; the mesh that they lie on is used.
      batch: prompts, one sequence per row, padded on the right (`processor(..., inference=True)`).
      **options: see `stream`.

    Returns:
      One `Generation` per row.
    """
    *_, (rows, _) = stream(config, params, batch, **options)
    return [row.result() for row in rows]


def stream(
    config: VL2Config,
    params,
    batch: Batch,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer=None,
    chunk_size: int = 0,
    dtype: jnp.dtype | None = None,
    cache_dtype: jnp.dtype | None = None,
) -> Iterator[tuple[list["RowAnswer"], list[str]]]:
    """Like `generate`, as an iterator over bursts of tokens.

    Args:
      config, params, batch: see `generate`.
      max_new_tokens: at most so many tokens; never beyond `max_position_embeddings`.
      temperature, top_p, top_k, repetition_penalty: see `SamplingParams`. The penalty counts the
        ids of prompt and answer, `<image>` among them, but no padding.
      stop: strings that end an answer; needs a tokenizer.
      seed: of the random draws, one for all rows or one per row. A row's draws depend on its own
        seed alone.
      eos_token_id: ids that end an answer; None: that of the tokenizer, else the configuration.
      tokenizer: turns tokens to text; None: no text, no stop strings.
      chunk_size: prefill so many tokens at a time, to save memory; 0: all at once.
      dtype: of the computation; None: that of the parameters.
      cache_dtype: of the cache; None: `dtype`.

    Yields:
      The rows so far, and for each row the text that the burst added (empty without a tokenizer).

    Raises:
      UserError: options out of range, a batch that is not one right-padded prompt per row, or a
        prompt that leaves no room for an answer.
    """
    started = time.perf_counter()
    sampling = SamplingParams.create(temperature, top_k, top_p, repetition_penalty)
    lengths = _prompt_lengths(config, batch, max_new_tokens, chunk_size)
    if stop and tokenizer is None:
        raise UserError("stop strings need a tokenizer: pass tokenizer=processor.tokenizer")
    if eos_token_id is None:
        eos_token_id = config.decoder.eos_token_id if tokenizer is None else tokenizer.eos_id
    eos = _as_list(eos_token_id)
    limit = config.decoder.max_position_embeddings
    budgets = np.minimum(max_new_tokens, limit - lengths)
    rows = [
        RowAnswer(Answer(tokenizer, eos, stop, int(budget)), int(length), started)
        for budget, length in zip(budgets, lengths, strict=True)
    ]
    dtype = dtype or compute_dtype(params)
    steps = programs(config, jnp.dtype(dtype), jax.default_backend())
    keys = _keys(seed, len(rows))

    with mesh_of(params):
        hidden, caches = prefill_prompts(
            *(steps, params, config.decoder, batch, lengths),
            new_tokens=int(budgets.max()),
            chunk_size=chunk_size,
            cache_dtype=cache_dtype,
        )
        positions = jnp.asarray(lengths, jnp.int32)
        seen = _seen(config.decoder.vocab_size, batch)
        tokens, seen = steps.choose(params, sampling, hidden, seen, keys, positions)
        state = DecodeState(caches, tokens, positions, seen, jnp.zeros(len(rows), bool), keys)
    fresh = np.asarray(tokens)[:, None].tolist()
    yield rows, [row.push(new) for row, new in zip(rows, fresh, strict=True)]

    eos_array = jnp.asarray(eos or [-1], jnp.int32)
    while not all(row.done for row in rows):
        count = min(BURST, max(row.room for row in rows if not row.done))
        done = np.asarray([row.done for row in rows])
        with mesh_of(params):
            state = state.replace(done=done)
            state, tokens = steps.burst(params, sampling, state, eos_array, count)
        fresh = np.asarray(tokens)[:, :count].tolist()
        yield rows, [row.push(new) for row, new in zip(rows, fresh, strict=True)]


@dataclasses.dataclass
class RowAnswer:
    """An answer under way, with its clock."""

    answer: Answer
    prompt_tokens: int
    started: float
    first: float = 0.0
    last: float = 0.0

    @property
    def done(self) -> bool:
        return self.answer.finish_reason is not None

    @property
    def room(self) -> int:
        return self.answer.max_new_tokens - len(self.answer.tokens)

    def push(self, tokens: Sequence[int]) -> str:
        """Takes the tokens of a burst, up to the end of the answer; gives the new text."""
        if self.done:
            return ""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return self.answer.push(tokens)

    def result(self) -> Generation:
        count, seconds = len(self.answer.tokens), self.last - self.first
        return Generation(
            tokens=list(self.answer.tokens),
            finish_reason=self.answer.finish_reason or "length",
            text=self.answer.text,
            prompt_tokens=self.prompt_tokens,
            seconds_to_first_token=self.first - self.started,
            tokens_per_second=(count - 1) / seconds if seconds > 0 else 0.0,
        )


def _prompt_lengths(
    config: VL2Config, batch: Batch, max_new_tokens: int, chunk_size: int
) -> np.ndarray:
    """int[B] lengths of the prompts, after checking that there is something to do."""
    segments, positions = np.asarray(batch.segment_ids), np.asarray(batch.positions)
    lengths = (segments > 0).sum(axis=1)
    expected = np.arange(segments.shape[1])[None] < lengths[:, None]
    if not np.array_equal(segments, expected) or (
        np.where(expected, positions - np.arange(segments.shape[1]), 0).any()
    ):
        raise UserError(
            "generation needs one prompt per row, padded on the right, with positions from 0;"
            " got packed or left-padded rows"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if chunk_size < 0:
        raise UserError(f"chunk_size must be 0 (off) or more, got {chunk_size}")
    limit = config.decoder.max_position_embeddings
    if lengths.min() < 1 or lengths.max() >= limit:
        raise UserError(
            f"prompts must have 1 to {limit - 1} tokens (max_position_embeddings {limit} less one"
            f" for an answer), got {lengths.min()} to {lengths.max()}"
        )
    return lengths


def _seen(vocab_size: int, batch: Batch) -> np.ndarray:
    """bool[B, vocab]: ids that occur in each prompt."""
    tokens, real = np.asarray(batch.tokens), np.asarray(batch.segment_ids) > 0
    seen = np.zeros((len(tokens), vocab_size), bool)
    row, column = np.nonzero(real)
    seen[row, tokens[row, column]] = True
    return seen


def _keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """PRNG keys [B], from one seed for all rows or one each."""
    seeds = [seed] * rows if isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise UserError(f"seed must be one number or one per row ({rows}), got {len(seeds)}")
    return jnp.stack([jax.random.key(one) for one in seeds])


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
