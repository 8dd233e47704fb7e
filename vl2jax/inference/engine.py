"""Continuous batching: answers requests from a queue, several at a time.

The engine decodes a batch of sequences in bursts of several tokens.  A finished sequence frees its
batch row for the next request: between bursts, the engine prefills waiting requests and inserts
them into free rows.  If none is waiting, it shrinks the batch instead.

Axis legend: B batch rows, T prompt tokens (padded), S cache slots.
"""

import dataclasses
import itertools
import time
from collections import abc, deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.inference.buckets import length_bucket, round_up, row_bucket
from vl2jax.inference.completion import Completion
from vl2jax.inference.image_cache import ImageCache
from vl2jax.inference.prefix_cache import Prefix, PrefixCache, any_shares_prefix, common_length
from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.sequence import Prompt, Sequence
from vl2jax.inference.steps import MAX_BURST, NO_TOKEN, DecodeState, compiled_steps
from vl2jax.model.decoder import Caches
from vl2jax.model.vl2 import compute_dtype
from vl2jax.ops.platform import platform_of
from vl2jax.parallel.mesh import mesh_of, spans_processes
from vl2jax.parallel.processes import assert_equal_across_processes
from vl2jax.processing.batch import TEXT

Events = list[tuple[Sequence, str]]  # sequences that got tokens, each with its new text

_LOOKAHEAD = 4  # length of the look-ahead queue, in multiples of the maximum number of batch rows
_MAX_PREFILL_TOKENS = 8192  # maximum number of tokens in one prefill, including padding
_MAX_PADDED_TOKENS = 2048  # the same for a prefill that is more than half padding


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences that are prefilled together.

    Attributes:
      rows: the sequences.  Their prompts start with the same `common` tokens as `prefix`.
      prefix: cached prefix that they share; None if `common` is 0.
      common: number of tokens that are taken from the cached prefix.
      keep: whether to add the prompt to the prefix cache, because waiting prompts share its prefix;
        then it is the only one in the group.
    """

    rows: list[Sequence]
    prefix: Prefix | None = None
    common: int = 0
    keep: bool = False


class Engine:
    """Answers requests with continuous batching.

    Compiled programs, encoded images and cached prefixes are kept between calls of `run`.

    Attributes:
      steps: the compiled programs.
      dtype: dtype of the computation.
      image_cache: encoded image tiles.
      prefilled: number of prompt tokens that were prefilled so far, without padding and without
        tokens taken from cached prefixes.
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
        stop: abc.Sequence[str] = (),
        eos_token_id: int | abc.Sequence[int] | None = None,
        chunk_size: int = 0,
        keep_turns: bool = False,
        check_prompts_equal: bool = False,
        dtype: jnp.dtype | None = None,
        cache_dtype: jnp.dtype | None = None,
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
        if chunk_size < 0:
            raise UserError(f"chunk_size must be 0 (off) or more, got {chunk_size}")
        if stop and tokenizer is None:
            raise UserError("stop strings need a tokenizer: pass tokenizer=processor.tokenizer")
        if eos_token_id is None:
            eos_token_id = config.decoder.eos_token_id if tokenizer is None else tokenizer.eos_id
        self._config, self._params = config, params
        self._sampling = SamplingParams.create(temperature, top_k, top_p, repetition_penalty)
        self._tokenizer, self._stop, self._eos = tokenizer, stop, _as_list(eos_token_id)
        self._eos_array = np.asarray(self._eos or [-1], np.int32)
        self._max_rows, self._chunk, self._keep_turns = rows, chunk_size, keep_turns
        self._n_compared = 0 if check_prompts_equal and spans_processes(params) else None
        dtype = jnp.dtype(dtype or compute_dtype(params))
        cache_dtype = None if cache_dtype is None else jnp.dtype(cache_dtype)
        self.steps = compiled_steps(config, dtype, platform_of(params), cache_dtype)
        self.dtype = dtype
        self.image_cache = ImageCache(self.steps, params)
        self._prefix_cache = PrefixCache()
        self._state: Any = None  # a `DecodeState` while rows are active
        self._rows: list[Sequence | None] = []
        self.prefilled_tokens = 0

    def row(self, prompt: Prompt, max_new_tokens: int = 512, seed: int = 0) -> Sequence:
        """Makes a sequence for `run`; its latency is measured from now.

        Args:
          prompt: the prompt.
          max_new_tokens: maximum number of tokens to generate; reduced so that prompt and answer
            fit into `max_position_embeddings`.
          seed: seed of the sequence's random draws.

        Raises:
          UserError: `max_new_tokens` is below 1, or the prompt is empty or leaves no room for an
            answer.
        """
        limit = self._config.decoder.max_position_embeddings
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
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
        source, waiting = iter(rows), deque()
        while True:
            _refill(waiting, source, self._max_rows * _LOOKAHEAD)
            while waiting and self._free_indices(waiting):
                with mesh_of(self._params):
                    events = self._admit(waiting)
                yield events
                _refill(waiting, source, self._max_rows * _LOOKAHEAD)
            if not self._active:
                return
            with mesh_of(self._params):
                events = self._burst(waiting)
            yield events

    @property
    def _active(self) -> list[tuple[int, Sequence]]:
        return [(i, row) for i, row in enumerate(self._rows) if row is not None]

    def _free_indices(self, waiting: deque) -> list[int]:
        """Indices of free batch rows; if no sequence is active, starts a batch of a new size."""
        if not self._active:  # size the batch for the waiting sequences
            self._state, self._rows = (
                None,
                [None] * row_bucket(min(len(waiting), self._max_rows), self._max_rows),
            )
        return [index for index, row in enumerate(self._rows) if row is None]

    def _admit(self, waiting: deque) -> Events:
        """Prefills the next group of sequences and inserts them into free batch rows."""
        free = self._free_indices(waiting)
        group = self._choose_group(waiting, len(free))
        for row in group.rows:
            waiting.remove(row)
            self._check_same_prompt(row.prompt)
        upcoming = [*group.rows, *itertools.islice(waiting, self._max_rows)]
        slots = length_bucket(max(row.max_length for row in upcoming))
        count = row_bucket(len(group.rows), len(self._rows))
        last, caches = self._prefill(group, count)
        if group.keep:
            self._prefix_cache.add(Prefix(group.rows[0].prompt.keys, caches))
        positions = np.ones(count, np.int32)
        seeds = np.zeros(count, np.uint32)
        seen = np.zeros((count, self._config.decoder.vocab_size), bool)
        # Padding rows come first: `_insert` writes them at the index of the first sequence, which
        # then overwrites them.
        offset = count - len(group.rows)
        for i, row in enumerate(group.rows, offset):
            positions[i], seeds[i] = len(row.prompt), row.seed
            seen[i, row.prompt.tokens] = True
        if self._state is not None:
            slots = max(slots, _slots(self._state.caches))
        state = self.steps.begin(
            *(self._params, self._sampling, last, caches, seen, positions, seeds, slots)
        )
        indices = free[: len(group.rows)]
        self._insert(state, offset, indices, slots)
        tokens = np.asarray(state.tokens).tolist()
        events = []
        for i, index, row in zip(itertools.count(offset), indices, group.rows, strict=False):
            self._rows[index] = row
            events.append((row, row.push([tokens[i]])))
        self._retire()
        return events

    def _check_same_prompt(self, prompt: Prompt) -> None:
        """Raises UserError if the processes of a run have different prompts."""
        if self._n_compared is not None:
            self._n_compared += 1
            name = "prompt" if self._n_compared == 1 else f"prompt {self._n_compared}"
            assert_equal_across_processes({"digest": prompt.digest}, name)

    def _insert(self, state: DecodeState, offset: int, indices: list[int], slots: int) -> None:
        """Inserts the rows of `state` into the batch at these indices; grows caches if needed."""
        if self._state is None and len(indices) == len(self._rows):
            self._state = state
            return
        if self._state is None:
            self._state = self.steps.empty_state(len(self._rows), slots)
        elif _slots(self._state.caches) < slots:
            grown = self.steps.repeat_caches(self._state.caches, len(self._rows), slots)
            self._state = dataclasses.replace(self._state, caches=grown)
        rows = np.array([indices[0]] * offset + indices, np.int32)
        self._state = self.steps.insert(self._state, state, rows)

    def _choose_group(self, waiting: deque, remaining_tokens: int) -> Group:
        """Chooses the first waiting sequence and others that can be prefilled with it."""
        head, *others = waiting
        prefix, common = self._prefix_cache.find(head.prompt)
        if prefix is None and any_shares_prefix(head.prompt, [row.prompt for row in others]):
            return Group([head], keep=True)
        rows = [head]
        for row in others:
            if len(rows) == remaining_tokens:
                break
            other_common = 0 if prefix is None else prefix.common_length(row.prompt)
            if other_common == common and self._can_join([*rows, row], common):
                rows.append(row)
        return Group(rows, prefix, common)

    def _can_join(self, rows: list[Sequence], common: int) -> bool:
        """Whether the last of these sequences should be prefilled together with the others.

        It should not if it shares a prefix with one of them, because it can reuse that prefix
        later, or if the padding would be too much.
        """
        *before, new = rows
        if not common and any(common_length(row.prompt.keys, new.prompt.keys) for row in before):
            return False
        lengths = [len(row.prompt) - common for row in rows]
        padded = len(rows) * length_bucket(max(lengths))
        return padded <= (_MAX_PREFILL_TOKENS if padded <= 2 * sum(lengths) else _MAX_PADDED_TOKENS)

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

    def _burst(self, waiting: deque) -> Events:
        """Decodes up to `MAX_BURST` tokens of all active sequences.

        If sequences are waiting, the burst ends when a sequence is finished.  Otherwise it ends
        when at most half of the batch rows are active, so that the batch can shrink.
        """
        if not waiting:
            self._shrink()
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

    def _shrink(self) -> None:
        """Removes free batch rows from the state once at least half of the rows are free."""
        indices = [index for index, _ in self._active]
        count = row_bucket(len(indices), self._max_rows)
        if 2 * count > len(self._rows):
            return
        rows = [self._rows[index] for index in indices]
        padding = count - len(indices)
        self._rows = [*rows, *[None] * padding]
        self._state = self.steps.take(
            self._state, np.array([*indices, *indices[:1] * padding], np.int32)
        )

    def _retire(self) -> None:
        """Frees the batch rows of finished sequences; with `keep_turns`, keeps the cache."""
        for index, row in self._active:
            if row.done:
                self._rows[index] = None
                if self._keep_turns and len(self._rows) == 1:
                    cached_tokens = np.array(row.answer.tokens[:-1], np.uint64)
                    keys = np.concatenate([row.prompt.keys, cached_tokens])
                    self._prefix_cache.add(Prefix(keys, self._state.caches))
                    self._state = None


def _refill(waiting: deque, source: Iterator[Sequence], most: int) -> None:
    """Takes sequences from `source` until `most` are waiting."""
    waiting.extend(itertools.islice(source, max(0, most - len(waiting))))


def _slots(caches: Caches) -> int:
    """Number of slots, S."""
    return jax.tree.leaves(caches)[0].shape[-2]


def _as_list(ids: int | abc.Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
