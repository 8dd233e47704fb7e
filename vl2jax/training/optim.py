"""AdamW or Muon, with schedules, learning rates per part of the model, and frozen parts.

A parameter is named by its path, for example "decoder/norm/scale".  A part of the model is named by
a prefix of its paths: "vision", "adaptor", "decoder", or a longer one such as "decoder/lm_head".
The optimizer gets only the trained parameters, as a flat dict by path; frozen parameters have
neither gradients nor optimizer state.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vl2jax.common.errors import UserError
from vl2jax.training.muon import scale_by_muon_or_adam

ALGORITHMS = ("adamw", "muon")
SCHEDULES = ("cosine", "step", "constant")

# No weight decay: scales, biases, the position embedding, and the two learned visual vectors.
NO_DECAY = re.compile(r".*/(scale|bias)|vision/pos_embed|image_newline|view_seperator")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule (paper, Table 2).

    Attributes:
      lr: peak learning rate.
      algorithm: "adamw", as in the paper, or "muon": Muon for matrices and AdamW for the other
        parameters, see `muon.py`.  With Muon, a model with random initial weights needs several
        times fewer samples.
      schedule: one of `SCHEDULES`, see `learning_rate`.
      warmup_steps: number of steps of linear warm-up.
      final_lr_fraction: final learning rate of `cosine`, as a fraction of `lr`.
      weight_decay: decoupled weight decay, for all parameters except `NO_DECAY`.
      b1, b2, eps: parameters of Adam.
      clip_norm: maximum global norm of the gradients.
      moments_dtype: dtype in which moments are stored between steps, "float32" or "bfloat16",
        whatever the dtype of the parameters.  bfloat16 needs b1 and b2 of at most 0.995: nearer to
        1, the decay of a moment is less than half a unit of its last place, and is lost.
      lr_multipliers: factor of the learning rate by part of the model; the longest match wins.
      frozen: parts of the model that are not trained.
    """

    lr: float
    algorithm: str = "adamw"
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_lr_fraction: float = 0.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    moments_dtype: str = "float32"
    lr_multipliers: dict = dataclasses.field(default_factory=dict)
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if self.moments_dtype == "bfloat16" and 0.995 < value < 1:
                raise UserError(
                    f"optim.{name} is {value}, but moments in bfloat16 decay only up to 0.995; set"
                    " optim.moments_dtype to float32"
                )


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate schedule of a run.

    The learning rate first increases linearly from `lr / warmup_steps` to `lr`.  `cosine` then
    decays to `final_lr_fraction * lr`.  `step` divides by sqrt(10) at 50% and again at 75% of all
    steps, warm-up included.  `constant` keeps `lr`.

    Args:
      cfg: optimizer configuration.
      steps: number of steps of the run.

    Returns:
      A function from the step, counted from 0, to its learning rate.
    """
    warm = cfg.warmup_steps
    if cfg.schedule == "cosine":
        decay = optax.cosine_decay_schedule(cfg.lr, max(1, steps - warm), cfg.final_lr_fraction)
        decay = optax.join_schedules([optax.constant_schedule(cfg.lr), decay], [warm])
    elif cfg.schedule == "step":
        drops = {math.ceil(part * steps): 10**-0.5 for part in (0.5, 0.75)}
        decay = optax.piecewise_constant_schedule(cfg.lr, drops)
    else:
        decay = optax.constant_schedule(cfg.lr)
    if warm < 2:
        return decay
    warmup = optax.linear_schedule(1 / warm, 1.0, warm - 1)
    return lambda count: decay(count) * warmup(count)


def trained_paths(cfg: OptimConfig, paths: Iterable[str]) -> tuple[str, ...]:
    """Paths of the parameters that are not frozen, sorted.

    Raises:
      UserError: a part in `frozen` or `lr_multipliers` matches no parameter, or all parameters are
        frozen.
    """
    paths = sorted(paths)
    for part in (*cfg.frozen, *cfg.lr_multipliers):
        if not any(_belongs(path, part) for path in paths):
            tops = sorted({path.split("/")[0] for path in paths})
            near = difflib.get_close_matches(part, tops, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {tops}"
            raise UserError(f"optim names the part {part!r}, which has no parameter{hint}")
    kept = tuple(p for p in paths if not any(_belongs(p, part) for part in cfg.frozen))
    if not kept:
        raise UserError(f"optim.frozen = {cfg.frozen} leaves nothing to train")
    return kept


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer, for a flat dict of parameters by path.

    It applies in this order: clipping by global norm, Adam or Muon, weight decay, learning rate,
    multipliers.  The paths of a saved optimizer state contain the indices of this chain, so do not
    change the order.  Updates are computed and returned in float32, whatever the dtype of the
    parameters and gradients.

    Args:
      cfg: optimizer configuration.
      steps: number of steps of the run.
    """
    scale = {"adamw": optax.scale_by_adam, "muon": scale_by_muon_or_adam}[cfg.algorithm]
    by_part = {part: optax.scale(factor) for part, factor in cfg.lr_multipliers.items()}
    return _in_float32(
        optax.clip_by_global_norm(cfg.clip_norm),
        _kept_in(scale(cfg.b1, cfg.b2, cfg.eps), jnp.dtype(cfg.moments_dtype)),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(cfg, steps)),
        optax.partition({"": optax.identity(), **by_part}, _part_of_each(cfg.lr_multipliers)),
    )


def decay_mask(params: Mapping[str, jax.Array]) -> dict[str, bool]:
    """By path, whether weight decay applies to a parameter."""
    return {path: not NO_DECAY.fullmatch(path) for path in params}


def _part_of_each(parts: Iterable[str]) -> Callable[[Mapping], dict[str, str]]:
    """Returns a function that maps each path to the longest part it belongs to, or ""."""
    longest_first = sorted(parts, key=len, reverse=True)

    def label(tree: Mapping) -> dict[str, str]:
        return {path: next((p for p in longest_first if _belongs(path, p)), "") for path in tree}

    return label


def _belongs(path: str, part: str) -> bool:
    return path == part or path.startswith(part.rstrip("/") + "/")


def _in_float32(*transformations: optax.GradientTransformation) -> optax.GradientTransformation:
    """Chains transformations, which get gradients and parameters in float32."""
    chain = optax.chain(*transformations)

    def init(params):
        return chain.init(_cast(params, jnp.float32))

    def update(updates, state, params=None):
        return chain.update(_cast(updates, jnp.float32), state, _cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)


def _kept_in(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """Stores the floating-point state of a transformation in `dtype`; computes in float32."""

    def init(params):
        return _cast(inner.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, _cast(state, jnp.float32), params)
        return updates, _cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _cast(tree: Any, dtype) -> Any:
    """Casts the floating-point leaves."""

    def one(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)
