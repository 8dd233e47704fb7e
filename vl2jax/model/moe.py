"""DeepSeekMoE layer: router, routed experts and shared experts (DeepSeek-V2, Eq. 20-22).

Axis legend: B rows, T tokens, D width, F expert width, E experts, K experts per token.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp

from vl2jax.config import DecoderConfig, required
from vl2jax.model.layers import GatedMLP
from vl2jax.model.losses import batch_balance_loss, expert_load, sequence_balance_loss
from vl2jax.model.parameter import parameter
from vl2jax.ops.experts import ExpertWeights, routed_experts
from vl2jax.ops.experts.sharded import sharded_experts
from vl2jax.ops.matmul import Weight, product
from vl2jax.parallel.mesh import current_mesh

EXPERT_STACKS = "expert_stacks"  # name of a Flax collection, see `expert_stacks`


@flax.struct.dataclass
class Routing:
    """The router's decision for each token.

    Attributes:
      weights: float32[..., K], gate values of the chosen experts, normalised and scaled as
        configured.
      experts: int32[..., K], ids of the chosen experts.
      scores: float32[..., E], scores of all experts, before the correction bias.
    """

    weights: jax.Array
    experts: jax.Array
    scores: jax.Array


@flax.struct.dataclass
class Balance:
    """Load balance of one layer's experts.

    Attributes:
      aux_loss: float32[], the auxiliary loss times `aux_loss_alpha`.
      load: float32[E], number of tokens routed to each expert, without padding.
    """

    aux_loss: jax.Array
    load: jax.Array


def route(cfg: DecoderConfig, logits: jax.Array, bias: jax.Array | None = None) -> Routing:
    """Chooses K experts per token and their gate values.

    `topk_method` decides how experts are chosen:

    - `greedy`: the K highest scores.
    - `group_limited_greedy`: first the `topk_group` groups with the highest best score, then the K
      highest scores within them.
    - `noaux_tc` (DeepSeek-V3, section 2.1.2): the same with score plus bias, where a group is
      ranked by the sum of its two best.  The gate values come from the scores without bias.

    Groups that are not chosen are masked with -inf.  The original masks them with 0, so their
    experts can win over experts whose biased scores are negative.

    Args:
      cfg: decoder configuration.
      logits: float32[..., E].
      bias: float32[E], `e_score_correction_bias`; required by `noaux_tc`, ignored otherwise.

    Returns:
      The chosen experts, their gate values and all scores.
    """
    top_k = required(cfg.num_experts_per_tok)
    score = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[cfg.scoring_func]
    scores = choice = score(logits.astype(jnp.float32))
    if cfg.topk_method == "noaux_tc":
        choice = scores + jnp.expand_dims(required(bias), range(scores.ndim - 1))
    if cfg.topk_method != "greedy":
        choice = _limit_groups(cfg, choice)
    _, experts = jax.lax.top_k(choice, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if cfg.norm_topk_prob and top_k > 1:
        weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
    return Routing(weights * cfg.routed_scaling_factor, experts, scores)


def _limit_groups(cfg: DecoderConfig, choice: jax.Array) -> jax.Array:
    """Masks experts outside the `topk_group` best groups with -inf."""
    grouped = choice.reshape(*choice.shape[:-1], cfg.n_group, -1)
    best = 2 if cfg.topk_method == "noaux_tc" else 1
    group_scores = jax.lax.top_k(grouped, best)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(group_scores, required(cfg.topk_group))
    keep = jax.nn.one_hot(kept, required(cfg.n_group), dtype=jnp.bool_).any(axis=-2)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(choice.shape)


class Gate(nn.Module):
    """Router, computed in float32 on every platform, see `ops.matmul.product`.

    The correction bias of `noaux_tc` is in the collection `router`, not in `params`: the optimizer
    does not train it.
    """

    cfg: DecoderConfig
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Routing:
        cfg, bias = self.cfg, None
        init = nn.initializers.normal(cfg.initializer_range)
        shape = (x.shape[-1], required(cfg.n_routed_experts))
        kernel = parameter(self, "kernel", init, shape, self.param_dtype)
        logits = product("BTD,DE->BTE", x.astype(jnp.float32), kernel.astype(jnp.float32))
        if cfg.topk_method == "noaux_tc":
            shape = (cfg.n_routed_experts,)
            bias = self.variable("router", "e_score_correction_bias", jnp.zeros, shape).value
        routing = route(cfg, logits, bias)
        self.sow("intermediates", "routing", routing)
        return routing


class Experts(nn.Module):
    """The routed experts of a layer; on a mesh they are computed by `ops.experts.sharded`.

    For inference, the weights of all layers of a run can be passed as one stack in the collection
    `EXPERT_STACKS` (see `expert_stacks`).  Then only the weights of chosen experts are read.  With
    weights in `params`, the scan over layers copies all experts of a layer first.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, routing: Routing, layer: jax.Array, implementation: str
    ) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; `layer` is the index of the layer in its run."""
        cfg = self.cfg
        experts, hidden, width = (
            required(cfg.n_routed_experts),
            cfg.moe_intermediate_size,
            x.shape[-1],
        )
        tokens = math.prod(x.shape[:-1])
        inputs = (
            x.reshape(tokens, width),
            routing.weights.reshape(tokens, -1),
            routing.experts.reshape(tokens, -1),
        )
        mesh = current_mesh()
        if self.has_variable(EXPERT_STACKS, "gate_proj"):
            names = ("gate_proj", "up_proj", "down_proj")
            stacks = ExpertWeights(*(self.get_variable(EXPERT_STACKS, name) for name in names))
            if mesh is not None:
                routed = (x, routing.weights, routing.experts)
                return sharded_experts(mesh, *routed, stacks, layer=layer)
            weights = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stacks)
            y = routed_experts(*inputs, weights, first=layer * experts, n_experts=experts)
            return y.reshape(x.shape)
        init = nn.initializers.normal(cfg.initializer_range)

        def weight(name: str, *shape: int) -> Weight:
            return parameter(self, name, init, (experts, *shape), self.param_dtype)

        weights = ExpertWeights(
            gate=weight("gate_proj", width, hidden),
            up=weight("up_proj", width, hidden),
            down=weight("down_proj", hidden, width),
        )
        if self.is_initializing():  # `init` needs only the parameters
            return x
        options: dict[str, Any] = {"implementation": implementation}
        if mesh is not None:
            return sharded_experts(mesh, x, routing.weights, routing.experts, weights, **options)
        return routed_experts(*inputs, weights, **options).reshape(x.shape)


def expert_stacks(variables: dict) -> dict:
    """Moves the weights of the routed experts from `params` to the collection `EXPERT_STACKS`.

    Args:
      variables: `{"params": ..., "router": ...}`; not changed.

    Returns:
      Variables for inference, with the same arrays.
    """
    flat = flax.traverse_util.flatten_dict(variables["params"])
    stacks = {path: leaf for path, leaf in flat.items() if "experts" in path}
    rest = {path: leaf for path, leaf in flat.items() if path not in stacks}
    unflatten = flax.traverse_util.unflatten_dict
    return {**variables, "params": unflatten(rest), EXPERT_STACKS: unflatten(stacks)}


class MoE(nn.Module):
    """MoE feed-forward network: weighted sum of the chosen experts, plus the shared experts.

    Attributes:
      implementation: how routed experts are computed, a name in `ops.experts.IMPLEMENTATIONS`.
      max_segments: largest segment id in the batch, for the sequence-wise auxiliary loss.
    """

    cfg: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    implementation: str = "blocked"
    max_segments: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, balance_ids: jax.Array | None, layer: jax.Array
    ) -> tuple[jax.Array, Balance | None]:
        """Maps [B, T, D] to [B, T, D] and computes the load balance.

        Args:
          x: [B, T, D].
          balance_ids: int32[B, T], the segment of each token counted in the load balance, 0 for
            the others.  None: no load balance is computed.
          layer: int32[], index of the layer in its run.

        Returns:
          [B, T, D], and the `Balance` or None.
        """
        cfg = self.cfg
        dtypes: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        routing = Gate(cfg, self.param_dtype, name="gate")(x)
        y = Experts(cfg, **dtypes, name="experts")(x, routing, layer, self.implementation)
        if cfg.n_shared_experts is not None:
            width = cfg.moe_intermediate_size * cfg.n_shared_experts
            init = nn.initializers.normal(cfg.initializer_range)
            y += GatedMLP(width, init, **dtypes, name="shared_experts")(x)
        if balance_ids is None:
            return y, None
        counted = balance_ids > 0
        if cfg.seq_aux:
            loss = sequence_balance_loss(
                routing.scores, routing.experts, balance_ids, self.max_segments
            )
        else:
            loss = batch_balance_loss(routing.scores, routing.experts, counted)
        load = expert_load(routing.experts, counted, required(cfg.n_routed_experts))
        return y, Balance(loss * cfg.aux_loss_alpha, load)
