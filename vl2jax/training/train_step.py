"""One training step as a pure function: loss, gradients, optimizer, expert balance.

Axis legend: P microbatches, B rows of each, T tokens, M layers with experts, E experts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vl2jax.model.vl2 import VL2, init_variables
from vl2jax.parallel.mesh import constrain
from vl2jax.parallel.sharding import param_spec
from vl2jax.processing.batch import Batch
from vl2jax.training.balance import balance_metrics, update_biases
from vl2jax.training.chunked_loss import chunked_next_token_loss

Flat = Mapping[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      step: int32[], steps done.
      params: nested dict, float32 unless chosen otherwise.
      router: float32 correction biases by layer, {} where routers have none.
      opt_state: of the optimizer, over the trained parameters by path.
    """

    step: jax.Array
    params: Any
    router: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is applied to, and what is saved as the model."""
        return {"params": self.params, "router": self.router}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step does, all static.

    Attributes:
      model: with the compute dtype, remat policy and expert implementation.
      optimizer: over a flat dict of the trained parameters, see `optim.make_optimizer`.
      schedule: learning rate by step, for the metrics.
      trained: paths of the trained parameters.
      bias_update_step: u of the loss-free balancing; 0 keeps the biases.
      loss_chunk: tokens whose logits a device holds at a time.
    """

    model: VL2
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    trained: tuple[str, ...]
    bias_update_step: float = 0.0
    loss_chunk: int = 256


class _Sums(NamedTuple):
    """What microbatches add up: cross entropy, correct tokens, auxiliary loss, expert load."""

    loss: jax.Array
    correct: jax.Array
    aux_loss: jax.Array
    load: jax.Array | None


def new_state(recipe: Recipe, variables: Mapping[str, Any]) -> TrainState:
    """The state before the first step, of variables as `VL2.init` or `load_params` give them."""
    params = variables["params"]
    opt_state = recipe.optimizer.init(_pick(params, recipe.trained))
    router = variables.get("router", {})
    return TrainState(jnp.zeros((), jnp.int32), params, router, opt_state)


def init_state(recipe: Recipe, key: jax.Array) -> TrainState:
    """The state of a model with random weights."""
    return new_state(recipe, init_variables(recipe.model, key))


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step: gradients of the mean loss over all supervised tokens of all pools.

    The cross entropy is a sum over tokens divided by their number in the whole batch, the
    auxiliary loss a mean over sequences of the whole batch: neither packing, padding nor the
    number of microbatches changes them.

    Args:
      recipe: static.
      state: may be donated.
      batch: with a leading axis P on every field; pools are run one after the other.

    Returns:
      The next state, and metrics: float32[] each, per-layer ones float32[M].
    """
    tokens, sequences = _totals(batch)
    loss = jax.value_and_grad(_pool_loss, argnums=1, has_aux=True)
    trained = _pick(state.params, recipe.trained)

    def one_pool(pool: Batch):
        (_, sums), grads = loss(
            recipe, trained, state.params, state.router, pool, tokens, sequences
        )
        return sums, {path: constrain(grad, *param_spec(path)) for path, grad in grads.items()}

    sums, grads = _sum_over_pools(one_pool, batch)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, trained)
    updated: Any = optax.apply_updates(trained, updates)  # a flat dict, as it was given
    params = _put(state.params, updated)
    metrics = {
        "train/loss": sums.loss,
        "train/token_acc": sums.correct / tokens,
        "train/aux_loss": sums.aux_loss,
        "train/grad_norm": optax.tree.norm(grads),
        "train/param_norm": optax.tree.norm(updated),
        "train/lr": recipe.schedule(state.step),
    }
    router, decoder = state.router, recipe.model.config.decoder
    if sums.load is not None:
        router = update_biases(decoder, router, sums.load, recipe.bias_update_step)
        balance = balance_metrics(decoder, router, sums.load)
        metrics |= {f"moe/{name}": value for name, value in balance.items()}
    return TrainState(state.step + 1, params, router, opt_state), metrics


def eval_step(
    recipe: Recipe, params, router, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross entropy, correct tokens and supervised tokens of a batch with pools: float32[] sums."""
    tokens, sequences = _totals(batch)
    one = jnp.ones((), jnp.float32)

    def one_pool(pool: Batch):
        return _pool_loss(recipe, {}, params, router, pool, one, sequences)[1]

    sums = _sum_over_pools(one_pool, batch)
    return sums.loss, sums.correct, tokens


def _pool_loss(recipe, trained: Flat, params, router, pool: Batch, tokens, sequences):
    """The part of one pool in the loss; `trained` replaces its namesakes in `params`."""
    params = _put(params, trained)
    output = recipe.model.apply(
        {"params": params, "router": router}, pool, with_logits=False, padding_counts=False
    )
    sums = chunked_next_token_loss(
        output.hidden,
        params["decoder"]["lm_head"]["kernel"],
        pool,
        dtype=recipe.model.dtype,
        chunk=recipe.loss_chunk,
    )
    cross_entropy, aux_loss, load = sums.loss_sum / tokens, jnp.zeros(()), None
    if output.balance is not None:
        share = _sequences(pool.segment_ids) / sequences
        aux_loss, load = output.balance.aux_loss.sum() * share, output.balance.load
    return cross_entropy + aux_loss, _Sums(cross_entropy, sums.correct, aux_loss, load)


def _sum_over_pools(one_pool, batch: Batch):
    """Sum of what `one_pool` gives; a single pool needs no loop and no accumulators."""
    if batch.tokens.shape[0] == 1:
        return one_pool(jax.tree.map(lambda x: x[0], batch))
    first = jax.eval_shape(one_pool, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    add = lambda total, pool: (jax.tree.map(jnp.add, total, one_pool(pool)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, batch)[0]


def _totals(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Supervised tokens and sequences of all pools, at least 1 each."""
    segments = batch.segment_ids
    # The first token of a sequence is a target of nothing.
    follows = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    tokens = jnp.sum(batch.loss_mask[..., 1:] & follows, dtype=jnp.float32)
    return jnp.maximum(tokens, 1), jnp.maximum(_sequences(segments), 1)


def _sequences(segment_ids: jax.Array) -> jax.Array:
    """Number of sequences in rows whose segments are numbered from 1."""
    return jnp.sum(jnp.max(segment_ids, axis=-1), dtype=jnp.float32)


def _pick(params, paths: tuple[str, ...]) -> dict[str, jax.Array]:
    flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    return {path: flat[path] for path in paths}


def _put(params, replacements: Flat):
    return unflatten_dict(flatten_dict(params, sep="/") | dict(replacements), sep="/")
