"""The train step as a pure function: loss, gradients, optimizer update, load balancing.

Axis legend: P microbatches, B rows of each, T tokens, M MoE layers, E experts.
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
from vl2jax.training.rounding import apply_updates

Flat = Mapping[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """State of a training run, except for that of the data.

    Attributes:
      step: int32[], number of steps done.
      params: parameters, a nested dict, float32 or bfloat16.
      router: float32 correction biases of the routers, a nested dict; {} if they have none.
      opt_state: state of the optimizer, for the trained parameters by path.
    """

    step: jax.Array
    params: Any
    router: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the model, as `VL2.apply` takes them and checkpoints store them."""
        return {"params": self.params, "router": self.router}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The static configuration of a step.

    Attributes:
      model: the model, with compute dtype, remat policy and implementation of the experts.
      optimizer: optimizer of a flat dict of the trained parameters, see `optim.make_optimizer`.
      schedule: learning rate by step, for the metrics.
      trained: paths of the trained parameters.
      bias_update_step: u of the auxiliary-loss-free balancing; 0 keeps the biases.
      loss_chunk: number of tokens whose logits a device holds at a time.
      seed: seed of the stochastic rounding of bfloat16 parameters, see `rounding.py`.
    """

    model: VL2
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    trained: tuple[str, ...]
    bias_update_step: float = 0.0
    loss_chunk: int = 256
    seed: int = 0


class _Sums(NamedTuple):
    """Sums over microbatches: cross entropy, correct tokens, auxiliary loss, expert load."""

    loss: jax.Array
    correct: jax.Array
    aux_loss: jax.Array
    load: jax.Array | None


def new_state(recipe: Recipe, variables: Mapping[str, Any]) -> TrainState:
    """Makes the state before the first step.

    Args:
      recipe: recipe of the step.
      variables: variables of the model, as `VL2.init` or `load_params` returns them.
    """
    params = variables["params"]
    opt_state = recipe.optimizer.init(_pick(params, recipe.trained))
    router = variables.get("router", {})
    return TrainState(jnp.zeros((), jnp.int32), params, router, opt_state)


def init_state(recipe: Recipe, key: jax.Array) -> TrainState:
    """Makes the initial state of a model with random parameters."""
    return new_state(recipe, init_variables(recipe.model, key))


def train_step(
    recipe: Recipe, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs one step.

    The loss is the mean cross entropy over all supervised tokens of the batch, plus the mean
    auxiliary loss over all its sequences.  Packing, padding and the number of microbatches do not
    change it.  Gradients are summed over microbatches and updates are added to parameters in
    float32.

    Args:
      recipe: static configuration.
      state: state before the step; it may be donated.
      batch: batch with a leading axis P on every field.  Microbatches run one after the other, and
        their gradients are summed.

    Returns:
      The next state, and metrics by name: float32[], or float32[M] for metrics of layers.
    """
    tokens, sequences = _totals(batch)
    loss = jax.value_and_grad(_microbatch_loss, argnums=1, has_aux=True)
    trained = _pick(state.params, recipe.trained)

    def one_microbatch(microbatch: Batch):
        (_, sums), grads = loss(
            recipe, trained, state.params, state.router, microbatch, tokens, sequences
        )
        grads = {path: constrain(grad, *param_spec(path)) for path, grad in grads.items()}
        return sums, _in_float32(grads)

    sums, grads = _sum_over_microbatches(one_microbatch, batch)
    updates: Any  # a flat dict, like `trained`; Optax types it as any tree
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, trained)
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    updated = apply_updates(trained, updates, key)
    params = _put(state.params, updated)
    metrics = {
        "train/loss": sums.loss,
        "train/token_acc": sums.correct / tokens,
        "train/aux_loss": sums.aux_loss,
        "train/grad_norm": optax.tree.norm(grads),
        "train/param_norm": optax.tree.norm(_in_float32(updated)),
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
    """Computes the sums for loss and accuracy, without gradients.

    Args:
      recipe: static configuration.
      params: parameters of the model.
      router: correction biases of the routers; {} if they have none.
      batch: batch with a leading axis P on every field.

    Returns:
      Cross entropy in nats, number of correct tokens, number of supervised tokens: float32[] each.
    """
    tokens, sequences = _totals(batch)
    one = jnp.ones((), jnp.float32)

    def one_microbatch(microbatch: Batch):
        return _microbatch_loss(recipe, {}, params, router, microbatch, one, sequences)[1]

    sums = _sum_over_microbatches(one_microbatch, batch)
    return sums.loss, sums.correct, tokens


def _microbatch_loss(recipe, trained: Flat, params, router, microbatch: Batch, tokens, sequences):
    """The contribution of one microbatch to the loss; `trained` overrides entries of `params`."""
    params = _put(params, trained)
    output = recipe.model.apply(
        {"params": params, "router": router}, microbatch, with_logits=False, padding_counts=False
    )
    sums = chunked_next_token_loss(
        output.hidden,
        params["decoder"]["lm_head"]["kernel"],
        microbatch,
        dtype=recipe.model.dtype,
        chunk=recipe.loss_chunk,
    )
    cross_entropy, aux_loss, load = sums.loss_sum / tokens, jnp.zeros(()), None
    if output.balance is not None:
        share = _sequences(microbatch.segment_ids) / sequences
        aux_loss, load = output.balance.aux_loss.sum() * share, output.balance.load
    return cross_entropy + aux_loss, _Sums(cross_entropy, sums.correct, aux_loss, load)


def _sum_over_microbatches(one_microbatch, batch: Batch):
    """Sums the results of all microbatches; a single one needs neither loop nor accumulators."""
    if batch.tokens.shape[0] == 1:
        return one_microbatch(jax.tree.map(lambda x: x[0], batch))
    first = jax.eval_shape(one_microbatch, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    add = lambda total, part: (jax.tree.map(jnp.add, total, one_microbatch(part)), None)  # noqa: E731
    return jax.lax.scan(add, zeros, batch)[0]


def _in_float32(tree: Flat) -> dict[str, jax.Array]:
    return {path: leaf.astype(jnp.float32) for path, leaf in tree.items()}


def _totals(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Numbers of supervised tokens and of sequences in all microbatches, at least 1 each."""
    segments = batch.segment_ids
    # The first token of a sequence is never a target.
    follows = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    tokens = jnp.sum(batch.loss_mask[..., 1:] & follows, dtype=jnp.float32)
    return jnp.maximum(tokens, 1), jnp.maximum(_sequences(segments), 1)


def _sequences(segment_ids: jax.Array) -> jax.Array:
    """Number of sequences in all rows; the segments of a row are numbered from 1."""
    return jnp.sum(jnp.max(segment_ids, axis=-1), dtype=jnp.float32)


def _pick(params, paths: tuple[str, ...]) -> dict[str, jax.Array]:
    flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    return {path: flat[path] for path in paths}


def _put(params, replacements: Flat):
    return unflatten_dict(flatten_dict(params, sep="/") | dict(replacements), sep="/")
