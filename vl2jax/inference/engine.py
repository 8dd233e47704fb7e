"""Continuous batching: answers requests from a queue, several at a time.

The engine decodes a batch of sequences in bursts of several tokens.  A finished sequence frees its
batch row for the next request: between bursts, the engine prefills waiting requests and inserts
them into free rows.  If none is waiting, it shrinks the batch instead.

Axis legend: B batch rows, T prompt tokens (padded), S cache slots.
"""

import dataclasses
import time
from collections import abc
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.inference.admission import Group, WaitingQueue
from vl2jax.inference.buckets import length_bucket, round_up, row_bucket
from vl2jax.inference.completion import Completion
from vl2jax.inference.image_cache import ImageCache
from vl2jax.inference.options import (
    read_dtype,
    read_seed,
    read_stop,
    read_token_ids,
    read_whole,
    split_seed,
)
from vl2jax.inference.prefix_cache import Prefix, PrefixCache
from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.sequence import Prompt, Sequence, block_hashes
from vl2jax.inference.steps import MAX_BURST, NO_TOKEN, DecodeState, compiled_steps
from vl2jax.model.decoder import Caches
from vl2jax.model.vl2 import compute_dtype
from vl2jax.ops.platform import platform_of
from vl2jax.parallel.mesh import mesh_of, spans_processes
from vl2jax.parallel.processes import assert_equal_across_processes
from vl2jax.processing.batch import TEXT

Events = list[tuple[Sequence, str]]  # sequences that got tokens, each with its new text

_LOOKAHEAD = 4  # length of the look-ahead queue, in multiples of the maximum number of batch rows


class Engine:
    """Answers requests with continuous batching.

    Compiled programs, encoded images and cached prefixes are kept between calls of `run`.

    Attributes:
      steps: the compiled programs.
      dtype: dtype of the computation.
      image_cache: encoded image tiles.
      prefilled_tokens: number of prompt tokens that were prefilled so far, without padding and
        without tokens taken from cached prefixes.
    """

    def __init__(
        self,
        config: VL2Config,
        params,
        *,
        rows: int = 8,
        tokenizer=None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        stop: str | abc.Sequence[str] | None = (),
        eos_token_id: int | abc.Sequence[int] | None = None,
        chunk_size: int = 0,
        keep_turns: bool = False,
        check_prompts_equal: bool = False,
        dtype: Any = None,
        cache_dtype: Any = None,
    ):
        """Prepares an engine; programs are compiled when they are first used.

        Args:
          config: architecture.
          params: variables of the model, as `vl2jax.load` returns them.
          rows: maximum number of sequences in the batch.
          keep_turns: whether to keep the cache of a finished sequence that was alone in the batch,
            for a prompt that continues the conversation.
          check_prompts_equal: whether to check, if the parameters are shared by several processes,
            that all answer the same prompts.
          tokenizer, temperature, top_p, top_k, repetition_penalty, stop, eos_token_id, chunk_size,
            dtype, cache_dtype: see `generate.stream`.

        Raises:
          UserError: an option is out of range, or `stop` is given without a tokenizer.
        """
        self._config, self._params = config, params
        self._sampling = SamplingParams.create(temperature, top_k, top_p, repetition_penalty)
        self._tokenizer, self._stop = tokenizer, read_stop(stop)
        if self._stop and tokenizer is None:
            raise UserError("stop strings need a tokenizer: pass tokenizer=processor.tokenizer")
        if eos_token_id is None:
            eos_token_id = config.decoder.eos_token_id if tokenizer is None else tokenizer.eos_id
        self._eos = read_token_ids(eos_token_id)
        self._eos_array = np.asarray(self._eos or [-1], np.int32)
        self._max_rows, self._keep_turns = read_whole("rows", rows, 1), keep_turns
        self._chunk = read_whole("chunk_size", chunk_size, 0)
        self._n_compared = 0 if check_prompts_equal and spans_processes(params) else None
        dtype = jnp.dtype(compute_dtype(params)) if dtype is None else read_dtype("dtype", dtype)
        cache_dtype = None if cache_dtype is None else read_dtype("cache_dtype", cache_dtype)
        self.steps = compiled_steps(config, dtype, platform_of(params), cache_dtype)
        self.dtype = dtype
        self.image_cache = ImageCache(self.steps, params)
        self._prefix_cache = PrefixCache()
        self._state: Any = None  # a `DecodeState` while rows are active
        self._rows: list[Sequence | None] = []
        self.prefilled_tokens = 0

    def check_answers(self, n: int) -> None:
        """Raises UserError if `n` answers to a prompt would all be the same."""
        if n > 1 and self._sampling.greedy:
            raise UserError(f"n={n} answers need a temperature above 0; greedy ones are all equal")

    def row(self, prompt: Prompt, max_new_tokens: int = 512, seed: int = 0) -> Sequence:
        """Makes a sequence for `run`; its latency is measured from now.

        Args:
          prompt: the prompt.
          max_new_tokens: maximum number of tokens to generate; reduced so that prompt and answer
            fit into `max_position_embeddings`.
          seed: seed of the sequence's random draws, a whole number of 64 bits.

        Raises:
          UserError: `max_new_tokens` is below 1, the seed has more bits, or the prompt is empty or
            leaves no room for an answer.
        """
        limit = self._config.decoder.max_position_embeddings
        max_new_tokens, seed = read_whole("max_new_tokens", max_new_tokens, 1), read_seed(seed)
        if not 1 <= len(prompt) < limit:
            raise UserError(
                f"prompts must have 1 to {limit - 1} tokens (max_position_embeddings {limit} less"
                f" one for an answer), got {len(prompt)}"
            )
        budget = min(max_new_tokens, limit - len(prompt))
        answer = Completion(self._tokenizer, self._eos, self._stop, budget)
        return Sequence(answer, prompt, seed, time.perf_counter())

    def run(self, rows: Iterable[Sequence]) -> Iterator[Events]:
        """Generates answers; sequences enter the batch roughly in their order.

        The answer of a sequence does not depend on the others in the batch.

        Args:
          rows: sequences made by `row`; read lazily, a little ahead of the batch.

        Yields:
          After each prefill and each burst: the sequences that got tokens, with their new text.
        """
        self._state, self._rows = None, []
        waiting = WaitingQueue(iter(rows), self._max_rows * _LOOKAHEAD)
        while True:
            waiting.refill()
            while waiting and self._free_indices(waiting):
                with mesh_of(self._params):
                    events = self._admit(waiting)
                yield events
                waiting.refill()
            if not self._active:
                return
            with mesh_of(self._params):
                events = self._burst(waiting)
            yield events

    @property
    def _active(self) -> list[tuple[int, Sequence]]:
        return [(i, row) for i, row in enumerate(self._rows) if row is not None]

    def _free_indices(self, waiting: WaitingQueue) -> list[int]:
        """Indices of free batch rows; if no sequence is active, starts a batch of a new size."""
        if not self._active:  # size the batch for the waiting sequences
            self._state, self._rows = (
                None,
                [None] * row_bucket(min(len(waiting), self._max_rows), self._max_rows),
            )
        return [index for index, row in enumerate(self._rows) if row is None]

    def _admit(self, waiting: WaitingQueue) -> Events:
        """Prefills the next group of sequences and inserts them into free batch rows."""
        free = self._free_indices(waiting)
        group = waiting.take(self._prefix_cache, len(free))
        for row in group.rows:
            self._check_same_prompt(row.prompt)
        count = row_bucket(len(group.rows), len(self._rows))
        last, caches = self._prefill(group, count)
        positions, active = np.ones(count, np.int32), np.zeros(count, bool)
        seeds = np.zeros((count, 2), np.uint32)
        seen = np.zeros((count, self._config.decoder.vocab_size), bool)
        # Padding rows come first: `insert` writes them at the index of the first sequence, which
        # then overwrites them.
        offset = count - len(group.rows)
        for i, row in enumerate(group.rows, offset):
            positions[i], seeds[i], active[i] = len(row.prompt), split_seed(row.seed), True
            seen[i, row.prompt.tokens] = True
        first = self.steps.begin(
            *(self._params, self._sampling, last, seen, positions, seeds, active)
        )
        indices = free[: len(group.rows)]
        for index, row in zip(indices, group.rows, strict=True):
            self._rows[index] = row
        self._make_room(self._slots_needed(waiting))
        at = np.array([indices[0]] * offset + indices, np.int32)
        self._state = self.steps.insert(self._state, first, caches, at)
        tokens = np.asarray(first.tokens).tolist()[offset:]
        events = [(row, row.push([token])) for row, token in zip(group.rows, tokens, strict=True)]
        if group.keep and group.rows[0].answer.error is None:
            kept = caches if count == 1 else self.steps.row_of_caches(caches, offset)
            self._prefix_cache.add(Prefix(group.rows[0].prompt.blocks, kept))
        self._retire()
        return events

    def _check_same_prompt(self, prompt: Prompt) -> None:
        """Raises UserError if the processes of a run have different prompts."""
        if self._n_compared is not None:
            self._n_compared += 1
            name = "prompt" if self._n_compared == 1 else f"prompt {self._n_compared}"
            assert_equal_across_processes({"digest": prompt.digest}, name)

    def _slots_needed(self, waiting: WaitingQueue) -> int:
        """Cache slots for the active sequences and for those that enter the batch next."""
        rows = [row for _, row in self._active] + waiting.upcoming(self._max_rows)
        return length_bucket(max(row.max_length for row in rows))

    def _make_room(self, slots: int) -> None:
        """Makes a state, or gives it more cache slots, so that each row has at least `slots`."""
        if self._state is None:
            self._state = self.steps.empty_state(len(self._rows), slots)
        elif _slots(self._state.caches) < slots:
            self._resize(self._state, None, slots)

    def _resize(self, state: DecodeState, rows: np.ndarray | None, slots: int) -> None:
        """Makes the state anew with only these rows (None: all) and with `slots` cache slots.

        The arrays of the caches are replaced one by one, so old and new caches never both exist as
        a whole.
        """
        self._state = None  # if this is interrupted, no reference to deleted arrays remains

        def replace(array: jax.Array) -> jax.Array:
            resized = self.steps.resize(array, rows, slots)
            array.delete()
            return resized

        caches = jax.tree.map(replace, state.caches)
        rest = dataclasses.replace(state, caches=None)
        if rows is not None:
            rest = self.steps.take(rest, rows)
        self._state = dataclasses.replace(rest, caches=caches)

    def _prefill(self, group: Group, count: int) -> tuple[Any, Caches]:
        """Last hidden state [B, D] of each prompt, and the caches; padding rows come first."""
        common, steps = group.common, self.steps
        prompts = [row.prompt for row in group.rows]
        lengths = np.ones(count, np.int32)
        lengths[count - len(prompts) :] = [len(prompt) - common for prompt in prompts]
        self.prefilled_tokens += sum(len(prompt) - common for prompt in prompts)
        whole = length_bucket(int(lengths.max()))
        chunk = min(self._chunk, whole) or whole
        length = round_up(int(lengths.max()), chunk) if chunk < whole else whole
        table, indices = self.image_cache.lookup(prompts)
        tokens = np.zeros((count, length), np.int32)
        index = np.full((count, length), TEXT, np.int32)
        for i, prompt in enumerate(prompts, count - len(prompts)):
            tokens[i, : lengths[i]] = prompt.tokens[common:]
            index[i, : lengths[i]] = indices[i - count + len(prompts)][common:]
        x = steps.embed(self._params, table, tokens, index)
        if group.prefix is None:
            caches = steps.caches(count, length)
        else:
            slots = length_bucket(common + length)
            caches = steps.repeat_caches(group.prefix.caches, count, slots)
        last = np.zeros((count, x.shape[-1]), self.dtype)
        for start in range(0, length, chunk):
            positions = np.arange(start, start + chunk, dtype=np.int32) + common
            positions = np.broadcast_to(positions, (count, chunk))
            part = x if chunk == length else x[:, start : start + chunk]
            hidden, caches = steps.prefill(self._params, part, positions, caches)
            last = steps.gather_last(last, hidden, lengths - 1 - start)
        return last, caches

    def _burst(self, waiting: WaitingQueue) -> Events:
        """Decodes up to `MAX_BURST` tokens of all active sequences.

        If sequences are waiting, the burst ends when a sequence is finished.  Otherwise it ends
        when at most half of the batch rows are active, so that the batch can shrink.
        """
        self._shrink(waiting)
        active = self._active
        smaller = 0 if len(self._rows) == 1 else len(self._rows) // 2
        stop_at = len(active) - 1 if waiting else min(smaller, len(active) - 1)
        rooms = sorted(row.remaining_tokens for _, row in active)
        count = min(MAX_BURST, rooms[len(active) - stop_at - 1])
        done = np.array([row is None for row in self._rows])
        state = dataclasses.replace(self._state, done=done)
        self._state, tokens = self.steps.burst(
            self._params, self._sampling, state, self._eos_array, count, stop_at
        )
        tokens = np.asarray(tokens)
        taken = int((tokens[0] != NO_TOKEN).sum())
        events = [(row, row.push(tokens[index, :taken].tolist())) for index, row in active]
        self._retire()
        return events

    def _shrink(self, waiting: WaitingQueue) -> None:
        """Makes the state smaller once half of it suffices.

        Batch rows are removed if at least half of them are free and no sequence is waiting, and
        cache slots if no sequence needs more than half of them.
        """
        indices = [index for index, _ in self._active]
        count = row_bucket(len(indices), self._max_rows)
        slots, needed = _slots(self._state.caches), self._slots_needed(waiting)
        if 2 * needed <= slots:
            slots = needed
        if not waiting and 2 * count <= len(self._rows):
            padding = count - len(indices)
            self._rows = [*(self._rows[index] for index in indices), *[None] * padding]
            kept = np.array([*indices, *indices[:1] * padding], np.int32)
            self._resize(self._state, kept, slots)
        elif slots < _slots(self._state.caches):
            self._resize(self._state, None, slots)

    def _retire(self) -> None:
        """Frees the batch rows of finished sequences; with `keep_turns`, keeps the cache."""
        for index, row in self._active:
            if row.done:
                self._rows[index] = None
                if self._keep_turns and len(self._rows) == 1 and row.answer.error is None:
                    cached_tokens = np.array(row.answer.tokens[:-1], np.uint64)
                    blocks = block_hashes(np.concatenate([row.prompt.keys, cached_tokens]))
                    self._prefix_cache.add(Prefix(blocks, self._state.caches))
                    self._state = None


def _slots(caches: Caches) -> int:
    """Number of slots, S."""
    return jax.tree.leaves(caches)[0].shape[-2]
