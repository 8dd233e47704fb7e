"""Sampling of the next token: repetition penalty, temperature, top-k, top-p, then one draw.

The order and the definitions are those of Hugging Face `generate`.  Nothing is sorted: top-k and
top-p both need only the lowest logit that is kept (`_cut`).

Axis legend: B rows, C candidates.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vl2jax.inference.options import Checks
from vl2jax.parallel.mesh import BATCH_AXES, constrain

CANDIDATES = 128  # number of highest logits in which top-k and top-p are looked for first
GREEDY_BELOW = 1e-5  # temperatures below it mean greedy decoding, as in vLLM
SEARCH = "nucleus_search"  # name scope of what runs only if a row keeps more tokens than candidates

_Cut = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class SamplingParams:
    """Parameters of sampling; the numbers can change without a recompilation.

    Attributes:
      temperature: divides the logits; below `GREEDY_BELOW` means greedy decoding.
      top_k: keeps the k highest logits and ties with the k-th; 0 keeps all.
      top_p: keeps the smallest set of tokens whose probabilities add up to at least this; of equal
        logits, those with the lower ids.  1 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens that occur in
        prompt or answer.
      greedy: whether to take the token with the highest logit; static, so it selects a program.
      truncates: whether top-k or top-p removes tokens; static as well.
    """

    temperature: float | jax.Array
    top_k: int | jax.Array
    top_p: float | jax.Array
    repetition_penalty: float | jax.Array
    greedy: bool = flax.struct.field(pytree_node=False)
    truncates: bool = flax.struct.field(pytree_node=False, default=True)

    @classmethod
    def create(
        cls,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> "SamplingParams":
        """Makes parameters after checking their ranges.

        Args:
          temperature, top_p, repetition_penalty: finite numbers.
          top_k: a whole number of any size; 0 or -1: all tokens.

        Raises:
          UserError: a parameter is out of range; all of them are named.
        """
        checks = Checks()
        heat = checks.real("temperature", temperature, lambda x: x >= 0, "0 (greedy) or more")
        most = checks.whole("top_k", top_k, lambda x: x >= -1, "a whole number, 0 or -1 for all")
        share = checks.real("top_p", top_p, lambda x: 0 < x <= 1, "above 0 and at most 1")
        penalty = checks.real("repetition_penalty", repetition_penalty, lambda x: x > 0, "above 0")
        checks.finish()
        return cls(
            temperature=heat,
            top_k=min(max(most, 0), 2**31 - 1),
            top_p=share,
            repetition_penalty=penalty,
            greedy=heat < GREEDY_BELOW,
            truncates=most > 0 or share < 1,
        )


def penalize(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """Applies the repetition penalty to the logits of tokens in `seen`.

    Args:
      logits: float32[B, vocab].
      seen: bool[B, vocab], tokens that occur in prompt or answer.
      penalty: divides positive logits and multiplies negative ones.

    Returns:
      float32[B, vocab].
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(
    logits: jax.Array,
    top_k: int | jax.Array,
    top_p: float | jax.Array,
    active: jax.Array | None = None,
) -> jax.Array:
    """Sets the logits that top-k and then top-p remove to -inf.

    Both are read off the `CANDIDATES` highest logits.  If a row keeps more tokens than that, its
    lowest kept logit is searched bit by bit instead; the search runs only if an active row needs
    it, and gives the same whether or not other rows need it.

    Args:
      logits: float32[B, vocab], finite.
      top_k, top_p: see `SamplingParams`.
      active: bool[B], rows whose result is used; None: all.

    Returns:
      float32[B, vocab].
    """
    logits = constrain(logits, BATCH_AXES)  # so that no step of the search is a collective
    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 and 0.0 are ties
    (lowest, last), found = _cut_of_candidates(logits, top_k, top_p)
    missing = ~found if active is None else ~found & active

    def search() -> _Cut:
        cut = _searched_cut(logits, top_k, top_p)
        return jnp.where(found, lowest, cut[0]), jnp.where(found, last, cut[1])

    with jax.named_scope(SEARCH):
        cut = jax.lax.cond(missing.any(), search, lambda: (lowest, last))
    lowest, last = cut[0][:, None], cut[1][:, None]
    ties = (logits == lowest) & (_ids(logits) <= last)
    return jnp.where((logits > lowest) | ties, logits, -jnp.inf)


def _cut_of_candidates(
    logits: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array
) -> tuple[_Cut, jax.Array]:
    """Finds the cut among the highest logits.

    Returns:
      The cut: the lowest logit that is kept, float32[B], and the last id with this logit that is
      kept, int32[B]; and whether the cut is among the candidates, bool[B].
    """
    # Without barriers XLA merges the slices below into the selection, and then sorts all logits.
    # One barrier for both results stops its partitioner.
    values, ids = map(
        jax.lax.optimization_barrier, jax.lax.top_k(logits, min(CANDIDATES, logits.shape[-1]))
    )
    count = values.shape[-1]
    highest = values[:, :1]
    kth = jnp.where(top_k > 0, values[:, jnp.clip(top_k, 1, count) - 1], -jnp.inf)[:, None]
    allowed = logits >= kth
    target = top_p * jnp.where(allowed, jnp.exp(logits - highest), 0).sum(axis=-1, keepdims=True)
    mass = jnp.where(values >= kth, jnp.exp(values - highest), 0).cumsum(axis=-1)
    reached = mass[:, -1:] >= target
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    kept = (values >= kth) & (before < target)
    at = kept.sum(axis=-1, keepdims=True) - 1
    everything = jnp.asarray(top_p >= 1)
    lowest = jnp.where(everything, kth, jnp.take_along_axis(values, at, axis=-1))[:, 0]
    last = jnp.where(everything, logits.shape[-1], jnp.take_along_axis(ids, at, axis=-1))[:, 0]
    holds_all = allowed.sum(axis=-1, keepdims=True) <= count
    found = (top_k <= count) & (everything | holds_all | reached)[:, 0]
    if count == logits.shape[-1]:
        found = jnp.ones_like(found)
    return (lowest, last), found


def _searched_cut(logits: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array) -> _Cut:
    """Finds the same cut by bisection over the bits of logits and ids."""
    bits = _ordered_bits(logits)
    kth = _largest(lambda low: (bits >= low).sum(axis=-1) >= top_k, logits)
    kth = jnp.where(top_k > 0, kth, 0)
    highest = logits.max(axis=-1, keepdims=True)
    mass = jnp.where(bits >= kth[:, None], jnp.exp(logits - highest), 0)
    target = top_p * mass.sum(axis=-1)

    def above(low: jax.Array) -> jax.Array:
        return jnp.where(bits >= low, mass, 0).sum(axis=-1)

    lowest = jnp.where(top_p < 1, _largest(lambda low: above(low) >= target, logits), kth)
    ties = bits == lowest[:, None]
    each = jnp.where(ties, mass, 0).max(axis=-1)
    more = jnp.ceil((target - above(lowest[:, None] + 1)) / each)  # number of ties that are kept
    ids = _ids(logits).astype(jnp.uint32)
    last = _largest(lambda end: (ties & (ids < end)).sum(axis=-1) < more, logits)
    last = jnp.minimum(jnp.where(top_p < 1, last, ids.size), ids.size).astype(jnp.int32)
    return jnp.where(ties, logits, -jnp.inf).max(axis=-1), last


def _largest(holds: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """The largest uint32[B] for which a condition holds.

    Args:
      holds: the condition: uint32[B, 1] -> bool[B]; if it holds for a number, it holds for all
        below.
      like: array with B rows.
    """

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(tried[:, None]), tried, found)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros(like.shape[0], jnp.uint32))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """Bits of float32 numbers, changed such that as uint32 they have the order of the numbers."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _ids(logits: jax.Array) -> jax.Array:
    """Token ids, int32[1, vocab]."""
    return jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]


def process_logits(
    params: SamplingParams,
    logits: jax.Array,
    seen: jax.Array,
    active: jax.Array | None = None,
) -> jax.Array:
    """Applies penalty, temperature, top-k and top-p; with `greedy` only the penalty.

    Args:
      params: see `SamplingParams`.
      logits: float32[B, vocab].
      seen: bool[B, vocab], tokens that occur in prompt or answer.
      active: see `truncate`.

    Returns:
      float32[B, vocab].
    """
    logits = penalize(logits, seen, params.repetition_penalty)
    if params.greedy:
        return logits
    limit = jnp.finfo(logits.dtype).max  # small divisors may overflow
    logits = jnp.clip(logits / params.temperature, -limit, limit)
    if not params.truncates:
        return logits
    return truncate(logits, params.top_k, params.top_p, active)


def next_token(
    params: SamplingParams,
    logits: jax.Array,
    seen: jax.Array,
    keys: jax.Array,
    active: jax.Array | None = None,
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      params: see `SamplingParams`.
      logits: float32[B, vocab].
      seen: bool[B, vocab], tokens that occur in prompt or answer.
      keys: PRNG keys [B], one per row, so that the draw of a row does not depend on the others.
      active: see `truncate`.

    Returns:
      int32[B].
    """
    logits = process_logits(params, logits, seen, active)
    if params.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw: Any = jax.vmap(jax.random.categorical)
    return draw(keys, logits).astype(jnp.int32)


def make_keys(seeds: jax.Array) -> jax.Array:
    """PRNG keys [B] from seeds of 64 bits.

    Args:
      seeds: uint32[B, 2], upper and lower half.  Seeds below 2**32 give `jax.random.key(seed)`.
    """
    keys = jax.vmap(jax.random.key)(seeds[:, 1])
    folded = jax.vmap(jax.random.fold_in)(keys, seeds[:, 0])
    return jnp.where(seeds[:, 0] == 0, keys, folded)
