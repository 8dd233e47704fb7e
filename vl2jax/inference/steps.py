"""The compiled steps of generation: encode pictures, embed, prefill, decode in bursts.

Axis legend: B rows, T prompt tokens (padded), S cache slots, D width, I tiles, Q tokens per tile.

Slot s of a row's cache holds the token at position s. Rows are padded on the right, so what
padding writes lies behind the prompt and is overwritten, token by token, before it can be seen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vl2jax.config import VL2Config
from vl2jax.inference.sampling import SamplingParams, next_token
from vl2jax.model.decoder import Caches, init_caches
from vl2jax.model.moe import expert_stacks
from vl2jax.model.vl2 import VL2
from vl2jax.ops.compiler_options import compiler_options
from vl2jax.parallel.mesh import constrain
from vl2jax.parallel.processes import must_wait_for_steps
from vl2jax.processing.batch import FIRST_TILE_ROW

BURST = 16  # tokens decoded on the device between two looks of the host
NOTHING = -1  # stands in the output of a burst for a token that was not computed


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


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """The compiled steps of generation; sizes in brackets are static.

    Attributes:
      table: (params, [I]) -> a table [2 + I * Q, D] for `image_index`, no tile encoded yet.
      encode: (params, table (donated), tiles, slots [I]) -> the table with these tiles in these
        slots; slots beyond the table are dropped.
      embed: (params, table, tokens, image_index) -> x [B, T, D].
      caches: ([B], [S]) -> empty caches.
      spread: (caches of one row, [B], [S]) -> caches of B equal rows with S slots.
      prefill: (params, x, positions, caches (donated)) -> hidden [B, T, D], caches.
      pick: (last [B, D], hidden [B, T, D], at [B]) -> `hidden` at these places, `last` where they
        are outside.
      begin: (params, sampling, last [B, D], caches, seen, positions, seeds, [S]) -> a state with S
        slots, whose tokens follow the prompts.
      idle: ([B], [S]) -> a state without a row at work.
      insert: (state (donated), other, rows) -> the state with row i of `other` as row `rows[i]`;
        of equal numbers the last counts.
      take: (state, rows) -> the state of these rows alone.
      burst: (params, sampling, state (donated), eos, count, stop_at) -> state, tokens [B, BURST],
        `NOTHING` behind the last step. Takes up to `count` steps, fewer if only `stop_at` rows, or
        less, are not done.
    """

    table: Callable
    encode: Callable
    embed: Callable
    caches: Callable
    spread: Callable
    prefill: Callable
    pick: Callable
    begin: Callable
    idle: Callable
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
    """Jitted steps for one architecture and dtype.

    Args:
      cache_dtype: None: that of the activations.
    """
    model: Any = VL2(config, dtype)
    cfg = config.decoder
    cache_dtype = cache_dtype or dtype

    def decode(params, x, positions, caches):
        return model.apply(expert_stacks(params), x, positions, caches, method=VL2.decode)

    options = compiler_options(dtype, backend)
    jit = functools.partial(jax.jit, compiler_options=options)

    @functools.partial(jax.jit, static_argnums=1)
    def table(params, slots):
        learned = model.apply(params, _no_tiles(config), method=VL2.image_table)[0]
        return jnp.pad(learned, ((0, slots * config.tokens_per_tile), (0, 0)))

    @functools.partial(jit, donate_argnums=1)
    def encode(params, table, tiles, slots):
        features = model.apply(params, tiles, method=VL2.image_table)[0, FIRST_TILE_ROW:]
        size = config.tokens_per_tile
        rows = FIRST_TILE_ROW + slots[:, None] * size + jnp.arange(size)[None]
        return table.at[rows.reshape(-1)].set(features, mode="drop")

    @jax.jit
    def embed(params, table, tokens, image_index):
        return model.apply(params, table[None], tokens, image_index, method=VL2.embed)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def caches(rows, slots):
        return init_caches(cfg, rows, slots, cache_dtype)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def spread(caches, rows, slots):
        def repeat(a):
            return jnp.broadcast_to(a, (a.shape[0], rows, *a.shape[2:]))

        return _fit(jax.tree.map(repeat, caches), slots)

    @functools.partial(jit, donate_argnums=3)
    def prefill(params, x, positions, caches):
        return decode(params, x, positions, caches)

    @jax.jit
    def pick(last, hidden, at):
        length = hidden.shape[1]
        found = hidden[jnp.arange(len(at)), jnp.clip(at, 0, length - 1)]
        return jnp.where(((at >= 0) & (at < length))[:, None], found, last)

    def choose(params, sampling, hidden, seen, keys, positions):
        """Tokens [B] at `positions`, and `seen` with them."""
        logits = model.apply(params, hidden, method=VL2.logits)
        draws = jax.vmap(jax.random.fold_in)(keys, positions)
        token = constrain(next_token(sampling, logits, seen, draws))  # whole, for every host
        return token, seen.at[jnp.arange(seen.shape[0]), token].set(True)

    @functools.partial(jax.jit, static_argnums=7)
    def begin(params, sampling, last, caches, seen, positions, seeds, slots):
        keys = jax.vmap(jax.random.key)(seeds)
        tokens, seen = choose(params, sampling, last, seen, keys, positions)
        done = jnp.zeros(positions.shape, bool)
        return DecodeState(_fit(caches, slots), tokens, positions, seen, done, keys)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def idle(rows, slots):
        numbers = jnp.zeros(rows, jnp.int32)
        seen, done = jnp.zeros((rows, cfg.vocab_size), bool), jnp.ones(rows, bool)
        keys = jax.vmap(jax.random.key)(numbers.astype(jnp.uint32))
        return DecodeState(
            init_caches(cfg, rows, slots, cache_dtype),
            *(numbers, numbers, seen, done, keys),
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def insert(state, other, rows):
        def put(axis, old, new):
            for i in range(len(rows)):
                row = jax.lax.slice_in_dim(new, i, i + 1, axis=axis)
                old = jax.lax.dynamic_update_slice_in_dim(old, row, rows[i], axis)
            return old

        def flat(one):
            return dataclasses.replace(one, caches=None, keys=jax.random.key_data(one.keys))

        joined = jax.tree.map(functools.partial(put, 0), flat(state), flat(other))
        caches = jax.tree.map(functools.partial(put, 1), state.caches, other.caches)
        keys = jax.random.wrap_key_data(joined.keys)
        return dataclasses.replace(joined, caches=caches, keys=keys)

    @jax.jit
    def take(state, rows):
        caches = jax.tree.map(lambda a: a[:, rows], state.caches)
        rest = jax.tree.map(lambda a: a[rows], dataclasses.replace(state, caches=None))
        return dataclasses.replace(rest, caches=caches)

    @functools.partial(jit, donate_argnums=2)
    def burst(params, sampling: SamplingParams, state: DecodeState, eos, count, stop_at):
        def step(carry):
            i, state, out = carry
            x = model.apply(params, state.tokens[:, None], method=VL2.embed_tokens)
            hidden, caches = decode(params, x, state.positions[:, None], state.caches)
            positions = state.positions + 1
            tokens, seen = choose(params, sampling, hidden[:, 0], state.seen, state.keys, positions)
            done = state.done | (tokens[:, None] == eos[None]).any(axis=1)
            state = DecodeState(caches, tokens, positions, seen, done, state.keys)
            return i + 1, state, out.at[:, i].set(tokens)

        def unfinished(carry):
            i, state, _ = carry
            return (i < count) & (jnp.sum(~state.done) > stop_at)

        out = jnp.full((state.tokens.shape[0], BURST), NOTHING, jnp.int32)
        _, state, out = jax.lax.while_loop(unfinished, step, (0, state, out))
        return state, constrain(out)

    steps = (table, encode, embed, caches, spread, prefill)
    steps += (pick, begin, idle, insert, take, burst)
    return CompiledSteps(*map(_waited_for, steps) if must_wait_for_steps() else steps)


def _waited_for(step: Callable) -> Callable:
    """A step that has ended when its call returns."""
    return lambda *args: jax.block_until_ready(step(*args))


def _no_tiles(config: VL2Config) -> jax.Array:
    side = config.vision.image_size
    return jnp.zeros((0, side, side, 3), jnp.uint8)


def _fit(caches: Caches, slots: int) -> Caches:
    """Caches [n, B, ..., S, K] cut or padded to `slots` slots."""

    def fit(a: jax.Array) -> jax.Array:
        a = a[..., :slots, :]
        return jnp.pad(a, (*((0, 0),) * (a.ndim - 2), (0, slots - a.shape[-2]), (0, 0)))

    return jax.tree.map(fit, caches)
