"""Answers prompts from a queue, several at a time: a row that is done gives its place to the next.

Axis legend: B rows, T prompt tokens (padded), S cache slots.
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
from vl2jax.inference.prefix_cache import Prefix, PrefixCache, common_length, others_begin_alike
from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.sequence import Prompt, Sequence
from vl2jax.inference.steps import BURST, NOTHING, DecodeState, compiled_steps
from vl2jax.model.decoder import Caches
from vl2jax.model.vl2 import compute_dtype
from vl2jax.ops.platform import platform_of
from vl2jax.parallel.mesh import mesh_of
from vl2jax.parallel.processes import assert_equal_across_processes
from vl2jax.processing.batch import TEXT

Events = list[tuple[Sequence, str]]  # rows that went on, each with its new text

_AHEAD = 4  # prompts looked at ahead of the rows, as a multiple of these
_PREFILL = 8192  # tokens, padding included, that rows prefilled together have at most
_SMALL = 2048  # as `_PREFILL`, where it is more than half padding


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are prefilled together.

    Attributes:
      rows: all begin with the same `common` tokens, those of `prefix`.
      prefix: None if `common` is 0.
      keep: whether the only row's prompt will serve others.
    """

    rows: list[Sequence]
    prefix: Prefix | None = None
    common: int = 0
    keep: bool = False


class Engine:
    """A model that answers; what it compiled, encoded and prefilled serves the next call as well.

    Attributes:
      steps: the compiled programs.
      dtype: of the computation.
      pictures: encoded.
      prefilled: prompt tokens that went through the decoder so far, padding not counted.
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
        compare_prompts: bool = False,
        dtype: jnp.dtype | None = None,
        cache_dtype: jnp.dtype | None = None,
    ):
        """
        Args:
          rows: answered together, at most.
          keep_turns: keep the cache of a finished answer, for a prompt that continues it.
          compare_prompts: where a mesh spans processes, make sure that all answer the same prompt.
          others: see `generate.stream`.

        Raises:
          UserError: options out of range.
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
        self._most, self._chunk, self._keep_turns = rows, chunk_size, keep_turns
        self._compared = 0 if compare_prompts else None
        dtype = jnp.dtype(dtype or compute_dtype(params))
        cache_dtype = None if cache_dtype is None else jnp.dtype(cache_dtype)
        self.steps = compiled_steps(config, dtype, platform_of(params), cache_dtype)
        self.dtype = dtype
        self.image_cache = ImageCache(self.steps, params)
        self._prefix_cache = PrefixCache()
        self._state: Any = None  # a `DecodeState` while rows are active
        self._rows: list[Sequence | None] = []
        self.prefilled = 0

    def row(self, prompt: Prompt, max_new_tokens: int = 512, seed: int = 0) -> Sequence:
        """An answer to be, for `run`; its clock starts now.

        Raises:
          UserError: no room for an answer.
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
        """Answers rows in about their order, taking them in as places become free.

        A row's answer does not depend on those beside it.

        Yields:
          After each step the rows that went on.
        """
        self._state, self._rows = None, []
        source, waiting = iter(rows), deque()
        while True:
            _fill(waiting, source, self._most * _AHEAD)
            while waiting and self._free(waiting):
                with mesh_of(self._params):
                    events = self._admit(waiting)
                yield events
                _fill(waiting, source, self._most * _AHEAD)
            if not self._active:
                return
            with mesh_of(self._params):
                events = self._burst(waiting)
            yield events

    @property
    def _active(self) -> list[tuple[int, Sequence]]:
        return [(i, row) for i, row in enumerate(self._rows) if row is not None]

    def _free(self, waiting: deque) -> list[int]:
        """Places for rows; without a state, those that it will have."""
        if not self._active:  # the next state fits what waits
            self._state, self._rows = (
                None,
                [None] * row_bucket(min(len(waiting), self._most), self._most),
            )
        return [place for place, row in enumerate(self._rows) if row is None]

    def _admit(self, waiting: deque) -> Events:
        """Prefills the next group and puts it into free places."""
        free = self._free(waiting)
        group = self._choose_group(waiting, len(free))
        for row in group.rows:
            waiting.remove(row)
            self._compare(row.prompt)
        soon = [*group.rows, *itertools.islice(waiting, self._most)]
        slots = length_bucket(max(row.total for row in soon))
        count = row_bucket(len(group.rows), len(self._rows))
        last, caches = self._prefill(group, count)
        if group.keep:
            self._prefix_cache.add(Prefix(group.rows[0].prompt.keys, caches))
        positions = np.ones(count, np.int32)
        seeds = np.zeros(count, np.uint32)
        seen = np.zeros((count, self._config.decoder.vocab_size), bool)
        # Padding comes first, so that a row takes the place back that its padding took.
        offset = count - len(group.rows)
        for i, row in enumerate(group.rows, offset):
            positions[i], seeds[i] = len(row.prompt), row.seed
            seen[i, row.prompt.tokens] = True
        if self._state is not None:
            slots = max(slots, _slots(self._state.caches))
        state = self.steps.begin(
            *(self._params, self._sampling, last, caches, seen, positions, seeds, slots)
        )
        places = free[: len(group.rows)]
        self._place(state, offset, places, slots)
        tokens = np.asarray(state.tokens).tolist()
        events = []
        for i, place, row in zip(itertools.count(offset), places, group.rows, strict=False):
            self._rows[place] = row
            events.append((row, row.push([tokens[i]])))
        self._retire()
        return events

    def _compare(self, prompt: Prompt) -> None:
        """Raises UserError where processes of one run are asked different things."""
        if self._compared is not None:
            self._compared += 1
            name = "prompt" if self._compared == 1 else f"prompt {self._compared}"
            assert_equal_across_processes({"digest": prompt.digest}, name)

    def _place(self, state: DecodeState, offset: int, places: list[int], slots: int) -> None:
        """Makes the rows of `state` rows of the engine's state, at these places."""
        if self._state is None and len(places) == len(self._rows):
            self._state = state
            return
        if self._state is None:
            self._state = self.steps.idle(len(self._rows), slots)
        elif _slots(self._state.caches) < slots:
            grown = self.steps.spread(self._state.caches, len(self._rows), slots)
            self._state = dataclasses.replace(self._state, caches=grown)
        rows = np.array([places[0]] * offset + places, np.int32)
        self._state = self.steps.insert(self._state, state, rows)

    def _choose_group(self, waiting: deque, room: int) -> Group:
        """The head of the queue, and others that go well with it."""
        head, *others = waiting
        prefix, common = self._prefix_cache.find(head.prompt)
        if prefix is None and others_begin_alike(head.prompt, [row.prompt for row in others]):
            return Group([head], keep=True)
        rows = [head]
        for row in others:
            if len(rows) == room:
                break
            theirs = 0 if prefix is None else prefix.common_length(row.prompt)
            if theirs == common and self._go_together([*rows, row], common):
                rows.append(row)
        return Group(rows, prefix, common)

    def _go_together(self, rows: list[Sequence], common: int) -> bool:
        """Whether prefilling these rows together wastes little, and shares all that it can."""
        *before, new = rows
        if not common and any(common_length(row.prompt.keys, new.prompt.keys) for row in before):
            return False
        lengths = [len(row.prompt) - common for row in rows]
        padded = len(rows) * length_bucket(max(lengths))
        return padded <= (_PREFILL if padded <= 2 * sum(lengths) else _SMALL)

    def _prefill(self, group: Group, count: int) -> tuple[Any, Caches]:
        """Last hidden state [B, D] of every prompt, and caches; padding rows come first."""
        common, steps = group.common, self.steps
        prompts = [row.prompt for row in group.rows]
        lengths = np.ones(count, np.int32)
        lengths[count - len(prompts) :] = [len(prompt) - common for prompt in prompts]
        self.prefilled += sum(len(prompt) - common for prompt in prompts)
        whole = length_bucket(int(lengths.max()))
        chunk = min(self._chunk, whole) or whole
        length = round_up(int(lengths.max()), chunk) if chunk < whole else whole
        table, indices = self.image_cache.place(prompts)
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
            caches = steps.spread(group.prefix.caches, count, slots)
        last = np.zeros((count, x.shape[-1]), self.dtype)
        for start in range(0, length, chunk):
            positions = np.arange(start, start + chunk, dtype=np.int32) + common
            positions = np.broadcast_to(positions, (count, chunk))
            part = x if chunk == length else x[:, start : start + chunk]
            hidden, caches = steps.prefill(self._params, part, positions, caches)
            last = steps.pick(last, hidden, lengths - 1 - start)
        return last, caches

    def _burst(self, waiting: deque) -> Events:
        """Decodes some tokens of all active rows, fewer where rows end that others can replace or
        that fewer rows could go on without."""
        if not waiting:
            self._shrink()
        active = self._active
        smaller = 0 if len(self._rows) == 1 else len(self._rows) // 2
        stop_at = len(active) - 1 if waiting else min(smaller, len(active) - 1)
        rooms = sorted(row.room for _, row in active)
        count = min(BURST, rooms[len(active) - stop_at - 1])
        done = np.array([row is None for row in self._rows])
        state = dataclasses.replace(self._state, done=done)
        self._state, tokens = self.steps.burst(
            self._params, self._sampling, state, self._eos_array, count, stop_at
        )
        tokens = np.asarray(tokens)
        taken = int((tokens[0] != NOTHING).sum())
        events = [(row, row.push(tokens[place, :taken].tolist())) for place, row in active]
        self._retire()
        return events

    def _shrink(self) -> None:
        """Leaves places out that nobody will take, once half of them are free."""
        places = [place for place, _ in self._active]
        count = row_bucket(len(places), self._most)
        if 2 * count > len(self._rows):
            return
        rows = [self._rows[place] for place in places]
        padding = count - len(places)
        self._rows = [*rows, *[None] * padding]
        self._state = self.steps.take(
            self._state, np.array([*places, *places[:1] * padding], np.int32)
        )

    def _retire(self) -> None:
        """Frees the places of rows that are done."""
        for place, row in self._active:
            if row.done:
                self._rows[place] = None
                if self._keep_turns and len(self._rows) == 1:
                    fed = np.array(row.answer.tokens[:-1], np.uint64)
                    keys = np.concatenate([row.prompt.keys, fed])
                    self._prefix_cache.add(Prefix(keys, self._state.caches))
                    self._state = None


def _fill(waiting: deque, source: Iterator[Sequence], most: int) -> None:
    waiting.extend(itertools.islice(source, max(0, most - len(waiting))))


def _slots(caches: Caches) -> int:
    return jax.tree.leaves(caches)[0].shape[-2]


def _as_list(ids: int | abc.Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
