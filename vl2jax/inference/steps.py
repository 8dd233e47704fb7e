"""The compiled steps of generation: encode images, embed, prefill, and decode in bursts.

Slot s of a row's cache holds the token at position s.  Prompts are padded on the right: padding is
written after the prompt, and each slot is overwritten by a generated token before attention reads
it.

Axis legend: B rows, T prompt tokens (padded), S cache slots, D width, I tiles, Q tokens per tile.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vl2jax.config import VL2Config
from vl2jax.inference.completion import NOT_FINITE
from vl2jax.inference.sampling import SamplingParams, make_keys, next_token
from vl2jax.model.decoder import Caches, init_caches
from vl2jax.model.moe import expert_stacks
from vl2jax.model.vl2 import VL2
from vl2jax.ops.compiler_options import compiler_options
from vl2jax.ops.platform import traced_for
from vl2jax.parallel.mesh import constrain
from vl2jax.parallel.processes import must_wait_for_steps
from vl2jax.processing.batch import FIRST_TILE_ROW

MAX_BURST = 16  # maximum number of decoding steps on the device before the host reads the tokens
NO_TOKEN = -1  # marks tokens in the output of a burst that were not computed


@flax.struct.dataclass
class DecodeState:
    """State of decoding, carried from step to step.

    Attributes:
      caches: caches of all tokens before `tokens`; None in what `begin` returns.
      tokens: int32[B], the last sampled tokens, the input of the next step; `NOT_FINITE` where the
        logits were not finite, which ends the row.
      positions: int32[B], positions of `tokens`.
      seen: bool[B, vocab], ids that occur in prompt or answer.
      done: bool[B], whether the row is finished or free.
      keys: PRNG keys [B].
    """

    caches: Caches | None
    tokens: jax.Array
    positions: jax.Array
    seen: jax.Array
    done: jax.Array
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """The compiled steps of generation.

    In the signatures below, sizes alone in brackets are static arguments.

    Attributes:
      table: (params, [I]) -> a table [2 + I * Q, D] for `image_index`, with I empty tile slots.
      encode: (params, table (donated), tiles uint8[I, S, S, 3] with S pixels per side, slots
        int32[I]) -> the table with tile i encoded into tile slot `slots[i]`.  Slots beyond the
        table are ignored.
      embed: (params, table, tokens int32[B, T], image_index int32[B, T]) -> x [B, T, D].
      caches: ([B], [S]) -> empty caches.
      repeat_caches: (caches of one row, [B], [S]) -> caches with B equal rows and S slots.
      row_of_caches: (caches, index) -> caches with only this row.
      resize: (array [n, B, ..., S, K] of caches, rows int32[b] or None, [S']) -> the array
        [n, b, ..., S', K] with only these rows, cut or padded to S' slots; None: all rows.  It
        takes one array, so that old and new caches need not exist as a whole at the same time.
      prefill: (params, x, positions int32[B, T], caches (donated)) -> hidden [B, T, D], caches.
      gather_last: (last [B, D], hidden [B, T, D], at int32[B]) -> [B, D]: row b of `hidden` at
        token `at[b]`, or of `last` if `at[b]` is not in 0 to T - 1.
      begin: (params, sampling, last [B, D], seen, positions, seeds uint32[B, 2], active bool[B]) ->
        a state without caches, with the first token of each answer, sampled from `last`.
      empty_state: ([B], [S]) -> a state whose rows are all free.
      insert: (state (donated), other without caches, caches, rows int32[n]) -> the state with row i
        of `other` and of `caches` at row `rows[i]`.  If an index occurs several times, the last row
        is used.
      take: (state without caches, rows int32[n]) -> a state of only these rows.
      burst: (params, sampling, state (donated), eos int32[n], count, stop_at) -> state, tokens
        int32[B, MAX_BURST].  Decodes up to `count` tokens per row.  Stops early once at most
        `stop_at` rows are not done; the remaining tokens are `NO_TOKEN`.
    """

    table: Callable
    encode: Callable
    embed: Callable
    caches: Callable
    repeat_caches: Callable
    row_of_caches: Callable
    resize: Callable
    prefill: Callable
    gather_last: Callable
    begin: Callable
    empty_state: Callable
    insert: Callable
    take: Callable
    burst: Callable


@functools.cache
def compiled_steps(
    config: VL2Config,
    dtype: jnp.dtype,
    backend: str,
    cache_dtype: jnp.dtype | None = None,
) -> CompiledSteps:
    """Makes the jitted steps for one architecture, dtype and platform.

    Args:
      config: architecture.
      dtype: dtype of the computation.
      backend: "cpu", "gpu" or "tpu", where the parameters are.
      cache_dtype: dtype of cached values; None: `dtype`.
    """
    model: Any = VL2(config, dtype)
    cfg = config.decoder
    cache_dtype = cache_dtype or dtype

    def decode(params, x, positions, caches):
        return model.apply(expert_stacks(params), x, positions, caches, method=VL2.decode)

    options = compiler_options(dtype, backend)

    def jit(step, **more):
        return jax.jit(traced_for(backend)(step), **more)

    optimized = functools.partial(jit, compiler_options=options)

    @functools.partial(jit, static_argnums=1)
    def table(params, slots):
        learned = model.apply(params, _no_tiles(config), method=VL2.image_table)[0]
        return jnp.pad(learned, ((0, slots * config.tokens_per_tile), (0, 0)))

    @functools.partial(optimized, donate_argnums=1)
    def encode(params, table, tiles, slots):
        features = model.apply(params, tiles, method=VL2.image_table)[0, FIRST_TILE_ROW:]
        size = config.tokens_per_tile
        rows = FIRST_TILE_ROW + slots[:, None] * size + jnp.arange(size)[None]
        return table.at[rows.reshape(-1)].set(features, mode="drop")

    @jit
    def embed(params, table, tokens, image_index):
        return model.apply(params, table[None], tokens, image_index, method=VL2.embed)

    @functools.partial(jit, static_argnums=(0, 1))
    def caches(rows, slots):
        return init_caches(cfg, rows, slots, cache_dtype)

    @functools.partial(jit, static_argnums=(1, 2))
    def repeat_caches(caches, rows, slots):
        def repeat(a):
            return jnp.broadcast_to(a, (a.shape[0], rows, *a.shape[2:]))

        return jax.tree.map(lambda a: _with_slots(repeat(a), slots), caches)

    @jit
    def row_of_caches(caches, index):
        def one(a):
            return jax.lax.dynamic_slice_in_dim(a, index, 1, axis=1)

        return jax.tree.map(one, caches)

    @functools.partial(jit, static_argnums=2)
    def resize(array, rows, slots):
        return _with_slots(array if rows is None else array[:, rows], slots)

    @functools.partial(optimized, donate_argnums=3)
    def prefill(params, x, positions, caches):
        return decode(params, x, positions, caches)

    @jit
    def gather_last(last, hidden, at):
        length = hidden.shape[1]
        found = hidden[jnp.arange(len(at)), jnp.clip(at, 0, length - 1)]
        return jnp.where(((at >= 0) & (at < length))[:, None], found, last)

    def choose(params, sampling, hidden, seen, keys, positions, active):
        """Samples tokens int32[B] for `positions`, and adds them to `seen`."""
        logits: Any = model.apply(params, hidden, method=VL2.logits)
        finite = jnp.isfinite(logits).all(axis=-1)
        draws = jax.vmap(jax.random.fold_in)(keys, positions)
        token = next_token(sampling, logits, seen, draws, active & finite)
        seen = seen.at[jnp.arange(seen.shape[0]), token].set(True)
        return constrain(jnp.where(finite, token, NOT_FINITE)), seen  # each host reads the tokens

    @jit
    def begin(params, sampling, last, seen, positions, seeds, active):
        keys = make_keys(seeds)
        tokens, seen = choose(params, sampling, last, seen, keys, positions, active)
        return DecodeState(None, tokens, positions, seen, ~active, keys)

    @functools.partial(jit, static_argnums=(0, 1))
    def empty_state(rows, slots):
        numbers = jnp.zeros(rows, jnp.int32)
        seen, done = jnp.zeros((rows, cfg.vocab_size), bool), jnp.ones(rows, bool)
        keys = jax.vmap(jax.random.key)(numbers.astype(jnp.uint32))
        return DecodeState(
            init_caches(cfg, rows, slots, cache_dtype),
            *(numbers, numbers, seen, done, keys),
        )

    @functools.partial(jit, donate_argnums=0)
    def insert(state, other, caches, rows):
        def put(axis, old, new):
            for i in range(len(rows)):
                row = jax.lax.slice_in_dim(new, i, i + 1, axis=axis)
                old = jax.lax.dynamic_update_slice_in_dim(old, row, rows[i], axis)
            return old

        def put_caches(old, new):
            return put(1, old, _with_slots(new, old.shape[-2]))

        def flat(one):
            return dataclasses.replace(one, caches=None, keys=jax.random.key_data(one.keys))

        joined = jax.tree.map(functools.partial(put, 0), flat(state), flat(other))
        caches = jax.tree.map(put_caches, state.caches, caches)
        keys = jax.random.wrap_key_data(joined.keys)
        return dataclasses.replace(joined, caches=caches, keys=keys)

    @jit
    def take(state, rows):
        return jax.tree.map(lambda a: a[rows], state)

    @functools.partial(optimized, donate_argnums=2)
    def burst(params, sampling: SamplingParams, state: DecodeState, eos, count, stop_at):
        def step(carry):
            i, state, out = carry
            x = model.apply(params, state.tokens[:, None], method=VL2.embed_tokens)
            hidden, caches = decode(params, x, state.positions[:, None], state.caches)
            positions = state.positions + 1
            tokens, seen = choose(
                *(params, sampling, hidden[:, 0], state.seen, state.keys, positions),
                active=~state.done,
            )
            ends = (tokens[:, None] == eos[None]).any(axis=1) | (tokens == NOT_FINITE)
            done = state.done | ends
            state = DecodeState(caches, tokens, positions, seen, done, state.keys)
            return i + 1, state, out.at[:, i].set(tokens)

        def unfinished(carry):
            i, state, _ = carry
            return (i < count) & (jnp.sum(~state.done) > stop_at)

        out = jnp.full((state.tokens.shape[0], MAX_BURST), NO_TOKEN, jnp.int32)
        _, state, out = jax.lax.while_loop(unfinished, step, (0, state, out))
        return state, constrain(out)

    steps = (table, encode, embed, caches, repeat_caches, row_of_caches, resize, prefill)
    steps += (gather_last, begin, empty_state, insert, take, burst)
    return CompiledSteps(*map(_blocking, steps) if must_wait_for_steps(backend) else steps)


def _blocking(step: Callable) -> Callable:
    """Wraps a step so that its call returns only after the computation has finished."""
    return lambda *args: jax.block_until_ready(step(*args))


def _no_tiles(config: VL2Config) -> jax.Array:
    """Zero tiles: uint8[0, S, S, 3] with S pixels per side."""
    side = config.vision.image_size
    return jnp.zeros((0, side, side, 3), jnp.uint8)


def _with_slots(a: jax.Array, slots: int) -> jax.Array:
    """Cuts or pads an array [n, B, ..., S, K] of caches to `slots` slots."""
    a = a[..., :slots, :]
    return jnp.pad(a, (*((0, 0),) * (a.ndim - 2), (0, slots - a.shape[-2]), (0, 0)))
