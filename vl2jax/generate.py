"""Generation: prefill (whole or in chunks), then decoding on the device in bursts.

Axis legend: B rows, T prompt tokens (padded), S cache slots, D width, n tokens of a burst.

Slot s of a row's cache holds the token at position s. Rows are padded on the right, so what
padding writes lies behind the prompt and is overwritten, token by token, before it can be seen.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vl2jax.answer import Answer
from vl2jax.batch import TEXT, Batch
from vl2jax.config import VL2Config
from vl2jax.decoder import Caches, init_caches
from vl2jax.errors import UserError
from vl2jax.model import VL2, compute_dtype
from vl2jax.sampling import SamplingParams, next_token

BURST = 16  # tokens decoded on the device between two looks of the host
_BUCKET = 64  # prompt and cache lengths are multiples of this, so that few programs compile
_TILE_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


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


@flax.struct.dataclass
class DecodeState:
    """What decoding carries from token to token.

    Attributes:
      caches: of the tokens before `tokens`.
      tokens: int32[B], chosen but not yet fed.
      positions: int32[B], of `tokens`.
      seen: bool[B, vocab], ids of prompt and answer.
      done: bool[B].
      keys: PRNG keys [B].
    """

    caches: Caches
    tokens: jax.Array
    positions: jax.Array
    seen: jax.Array
    done: jax.Array
    keys: jax.Array


def generate(config: VL2Config, params, batch: Batch, **options) -> list[Generation]:
    """Answers every row of a batch; a row's answer does not depend on the others.

    Args:
      config: architecture.
      params: variables of the model, as `vl2jax.load` gives.
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
      eos_token_id: ids that end an answer; None: that of the configuration.
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
    eos = _as_list(config.decoder.eos_token_id if eos_token_id is None else eos_token_id)
    limit = config.decoder.max_position_embeddings
    budgets = np.minimum(max_new_tokens, limit - lengths)
    rows = [
        RowAnswer(Answer(tokenizer, eos, stop, int(budget)), int(length), started)
        for budget, length in zip(budgets, lengths, strict=True)
    ]
    dtype = dtype or compute_dtype(params)
    programs = _programs(config, jnp.dtype(dtype), jax.default_backend())
    keys = _keys(seed, len(rows))

    hidden, caches = _prefill(
        config, programs, params, batch, lengths, int(budgets.max()), chunk_size, cache_dtype
    )
    seen = _seen(config.decoder.vocab_size, batch)
    state = programs.first(params, sampling, caches, hidden, jnp.asarray(lengths), seen, keys)
    yield (
        rows,
        [
            row.push([token])
            for row, token in zip(rows, np.asarray(state.tokens).tolist(), strict=True)
        ],
    )

    eos_array = jnp.asarray(eos or [-1], jnp.int32)
    while not all(row.done for row in rows):
        count = min(BURST, max(row.room for row in rows if not row.done))
        done = jnp.asarray([row.done for row in rows])
        state, tokens = programs.burst(params, sampling, state.replace(done=done), eos_array, count)
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


def _prefill(config, programs, params, batch, lengths, new_tokens, chunk_size, cache_dtype):
    """Last hidden state [B, D] of every prompt, and the caches with room for the answer."""
    rows, longest = len(lengths), int(lengths.max())
    slots = _round_up(longest + new_tokens, _BUCKET)
    length = _round_up(longest, chunk_size or _BUCKET)
    x = programs.embed(params, **_padded(batch, length))
    dtype = cache_dtype or x.dtype
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    if not chunk_size:
        caches = init_caches(config.decoder, rows, length, dtype)
        hidden, caches = programs.prefill(params, x, positions, caches)
        grow = max(0, slots - length)
        caches = jax.tree.map(lambda a: jnp.pad(a, _after_axis_2(a.ndim, grow)), caches)
        return hidden[np.arange(rows), lengths - 1], caches
    caches = init_caches(config.decoder, rows, max(slots, length), dtype)
    last = jnp.zeros((rows, x.shape[-1]), x.dtype)
    for start in range(0, length, chunk_size):
        chunk = slice(start, start + chunk_size)
        hidden, caches = programs.prefill(params, x[:, chunk], positions[:, chunk], caches)
        at = lengths - 1 - start
        inside = (at >= 0) & (at < chunk_size)
        found = hidden[np.arange(rows), np.clip(at, 0, chunk_size - 1)]
        last = jnp.where(inside[:, None], found, last)
    return last, caches


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The compiled steps of generation."""

    embed: Callable
    prefill: Callable
    first: Callable
    burst: Callable


@functools.cache
def _programs(config: VL2Config, dtype: jnp.dtype, backend: str) -> _Programs:
    """Jitted steps for one architecture and dtype."""
    model = VL2(config, dtype)
    options = None
    if backend == "cpu" and dtype == jnp.bfloat16:
        # XLA's CPU compiler would convert all stacked bfloat16 weights to float32 ahead of the
        # loop over layers: several times slower, and the whole model once more in memory.
        options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    jit = functools.partial(jax.jit, compiler_options=options)

    @jit
    def embed(params, tiles, tokens, image_index):
        table = model.apply(params, tiles, method=VL2.image_table)
        return model.apply(params, table, tokens, image_index, method=VL2.embed)

    @functools.partial(jit, donate_argnums=3)
    def prefill(params, x, positions, caches):
        return model.apply(params, x, positions, caches, method=VL2.decode)

    def choose(params, sampling, hidden, seen, keys, positions):
        logits = model.apply(params, hidden, method=VL2.logits)
        draws = jax.vmap(jax.random.fold_in)(keys, positions)
        token = next_token(sampling, logits, seen, draws)
        return token, seen.at[jnp.arange(seen.shape[0]), token].set(True)

    @jit
    def first(params, sampling, caches, hidden, lengths, seen, keys):
        tokens, seen = choose(params, sampling, hidden, seen, keys, lengths)
        done = jnp.zeros(lengths.shape, jnp.bool_)
        positions = lengths.astype(jnp.int32)
        return DecodeState(caches, tokens, positions, seen, done, keys)

    @functools.partial(jit, donate_argnums=2)
    def burst(params, sampling, state, eos, count):
        def step(carry):
            i, state, out = carry
            x = model.apply(params, state.tokens[:, None], method=VL2.embed_tokens)
            hidden, caches = model.apply(
                params, x, state.positions[:, None], state.caches, method=VL2.decode
            )
            positions = state.positions + 1
            tokens, seen = choose(params, sampling, hidden[:, 0], state.seen, state.keys, positions)
            done = state.done | (tokens[:, None] == eos[None]).any(axis=1)
            state = DecodeState(caches, tokens, positions, seen, done, state.keys)
            return i + 1, state, out.at[:, i].set(tokens)

        def unfinished(carry):
            i, state, _ = carry
            return (i < count) & ~state.done.all()

        out = jnp.zeros((state.tokens.shape[0], BURST), jnp.int32)
        _, state, out = jax.lax.while_loop(unfinished, step, (0, state, out))
        return state, out

    return _Programs(embed, prefill, first, burst)


def _padded(batch: Batch, length: int) -> dict[str, np.ndarray]:
    """Arrays of the prompt at `length` tokens, and tiles at a bucketed number of slots."""

    def fit(x: np.ndarray, value: int) -> np.ndarray:
        x = np.asarray(x)[:, :length]
        return np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value)

    tiles = np.asarray(batch.tiles)
    slots = next((n for n in _TILE_BUCKETS if n >= len(tiles)), _round_up(len(tiles), 16))
    return {
        "tiles": np.pad(tiles, ((0, slots - len(tiles)), *((0, 0),) * 3)),
        "tokens": fit(batch.tokens, 0),
        "image_index": fit(batch.image_index, TEXT),
    }


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


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _after_axis_2(ndim: int, grow: int) -> tuple[tuple[int, int], ...]:
    """Padding of a cache [n, B, S, ...] along S."""
    return ((0, 0), (0, 0), (0, grow), *((0, 0),) * (ndim - 3))
