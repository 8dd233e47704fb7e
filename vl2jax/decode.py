"""The compiled steps of generation: embed, prefill (whole or in chunks), decode in bursts.

Axis legend: B rows, T prompt tokens (padded), S cache slots, D width, n tokens of a burst.

Slot s of a row's cache holds the token at position s. Rows are padded on the right, so what
padding writes lies behind the prompt and is overwritten, token by token, before it can be seen.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vl2jax.ambient import batch_shards, constrain, current_mesh
from vl2jax.batch import TEXT, Batch
from vl2jax.config import DecoderConfig, VL2Config
from vl2jax.decoder import Caches, init_caches
from vl2jax.model import VL2
from vl2jax.moe import expert_stacks
from vl2jax.sampling import next_token

BURST = 16  # tokens decoded on the device between two looks of the host
_BUCKET = 64  # prompt and cache lengths are multiples of this, so that few programs compile
_TILE_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


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
class Programs:
    """The compiled steps of generation.

    Attributes:
      embed: (params, tiles, tokens, image_index) -> x [B, T, D].
      prefill: (params, x, positions, caches) -> hidden [B, T, D], caches (donated).
      choose: (params, sampling, hidden [B, D], seen, keys, positions) -> tokens [B], seen; the
        token at `positions`.
      burst: (params, sampling, state (donated), eos, count) -> state, tokens [B, BURST] of which
        the first `count` are meant.
    """

    embed: Callable
    prefill: Callable
    choose: Callable
    burst: Callable


@functools.cache
def programs(config: VL2Config, dtype: jnp.dtype, backend: str) -> Programs:
    """Jitted steps for one architecture and dtype."""
    model = VL2(config, dtype)

    def decode(params, x, positions, caches):
        return model.apply(expert_stacks(params), x, positions, caches, method=VL2.decode)

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
        return decode(params, x, positions, caches)

    @jax.jit  # no loop over layers, and part of `burst` as well
    def choose(params, sampling, hidden, seen, keys, positions):
        logits = model.apply(params, hidden, method=VL2.logits)
        draws = jax.vmap(jax.random.fold_in)(keys, positions)
        token = constrain(next_token(sampling, logits, seen, draws))  # whole, for every host
        return token, seen.at[jnp.arange(seen.shape[0]), token].set(True)

    @functools.partial(jit, donate_argnums=2)
    def burst(params, sampling, state, eos, count):
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
            return (i < count) & ~state.done.all()

        out = jnp.zeros((state.tokens.shape[0], BURST), jnp.int32)
        _, state, out = jax.lax.while_loop(unfinished, step, (0, state, out))
        return state, constrain(out)

    return Programs(embed, prefill, choose, burst)


_empty_caches = jax.jit(init_caches, static_argnums=(0, 1, 2, 3))  # made where they belong


def prefill_prompts(
    steps: Programs,
    params,
    cfg: DecoderConfig,
    batch: Batch,
    lengths: np.ndarray,
    new_tokens: int,
    chunk_size: int = 0,
    cache_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, Caches]:
    """Last hidden state [B, D] of every prompt, and caches with room for `new_tokens` more.

    Args:
      steps: the compiled steps.
      params: variables of the model.
      cfg: decoder configuration.
      batch: prompts, padded on the right.
      lengths: int[B], their lengths.
      new_tokens: of the longest answer.
      chunk_size: prompt tokens at a time; 0: all.
      cache_dtype: None: that of the activations.
    """
    rows, longest = len(lengths), int(lengths.max())
    slots = _round_up(longest + new_tokens, _BUCKET)
    chunk_size = min(chunk_size, _round_up(longest, _BUCKET))
    length = _round_up(longest, chunk_size or _BUCKET)
    x = steps.embed(params, **_padded(batch, length))
    dtype = jnp.dtype(cache_dtype or x.dtype)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    if not chunk_size:
        caches = _empty_caches(cfg, rows, length, dtype)
        hidden, caches = steps.prefill(params, x, positions, caches)
        grow = max(0, slots - length)
        caches = jax.tree.map(lambda a: jnp.pad(a, _after_axis_2(a.ndim, grow)), caches)
        return hidden[np.arange(rows), lengths - 1], caches
    caches = _empty_caches(cfg, rows, max(slots, length), dtype)
    last = jnp.zeros((rows, x.shape[-1]), x.dtype)
    for start in range(0, length, chunk_size):
        chunk = slice(start, start + chunk_size)
        hidden, caches = steps.prefill(params, x[:, chunk], positions[:, chunk], caches)
        at = lengths - 1 - start
        inside = (at >= 0) & (at < chunk_size)
        found = hidden[np.arange(rows), np.clip(at, 0, chunk_size - 1)]
        last = jnp.where(inside[:, None], found, last)
    return last, caches


def _padded(batch: Batch, length: int) -> dict[str, np.ndarray]:
    """Arrays of the prompt at `length` tokens, and tiles at a bucketed number of slots."""

    def fit(x: np.ndarray, value: int) -> np.ndarray:
        x = np.asarray(x)[:, :length]
        return np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=value)

    tiles, mesh = np.asarray(batch.tiles), current_mesh()
    slots = next((n for n in _TILE_BUCKETS if n >= len(tiles)), _round_up(len(tiles), 16))
    slots = slots if mesh is None else _round_up(slots, batch_shards(mesh))
    return {
        "tiles": np.pad(tiles, ((0, slots - len(tiles)), *((0, 0),) * 3)),
        "tokens": fit(batch.tokens, 0),
        "image_index": fit(batch.image_index, TEXT),
    }


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _after_axis_2(ndim: int, grow: int) -> tuple[tuple[int, int], ...]:
    """Padding of a cache [n, B, S, ...] along S."""
    return ((0, 0), (0, 0), (0, grow), *((0, 0),) * (ndim - 3))
