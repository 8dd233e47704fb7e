"""AdamW or Muon, with schedules, learning rates per part of the model, and frozen parts.

Parameters are named by their path, "decoder/norm/scale"; a part of the model by the beginning of
its paths ("vision", "adaptor", "decoder", or deeper: "decoder/lm_head").  The optimizer sees only
the trained parameters, as a flat dict by path: frozen ones have neither gradients nor state.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax

from vl2jax.common.errors import UserError
from vl2jax.training.muon import scale_by_muon_or_adam

ALGORITHMS = ("adamw", "muon")
SCHEDULES = ("cosine", "step", "constant")

# Not decayed: scales and biases, the position embedding, the two learned visual vectors.
NO_DECAY = re.compile(r".*/(scale|bias)|vision/pos_embed|image_newline|view_seperator")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule (paper, Table 2).

    Attributes:
      lr: peak learning rate.
      algorithm: "adamw", the paper's, or "muon" for matrices with AdamW for the rest, see `muon`:
        a model that starts from random weights learns from several times fewer samples with it.
      schedule: of `SCHEDULES`, see `learning_rate`.
      warmup_steps: linear warm-up before it.
      final_lr_fraction: where `cosine` ends, as a part of `lr`.
      weight_decay: decoupled, for all but `NO_DECAY`.
      b1, b2, eps: of Adam.
      clip_norm: largest norm of the gradients of all trained parameters together.
      moments_dtype: in which both moments are kept between steps: "float32" or "bfloat16".
      lr_multipliers: part of the model -> factor of its learning rate; the longest match wins.
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
        for name, value, choices in (
            ("algorithm", self.algorithm, ALGORITHMS),
            ("schedule", self.schedule, SCHEDULES),
            ("moments_dtype", self.moments_dtype, ("float32", "bfloat16")),
        ):
            if value not in choices:
                raise UserError(f"optim.{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("lr", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"optim.{name} must be above 0, got {getattr(self, name)}")


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0, of a run of `steps` steps.

    `cosine` falls from the end of the warm-up to `final_lr_fraction`; `step` divides by sqrt(10)
    at 50% and again at 75% of all steps; `constant` stays.
    """

    def schedule(count: jax.Array) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        if cfg.schedule == "cosine":
            after = jnp.clip((count - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps), 0, 1)
            half = 0.5 * (1 + jnp.cos(jnp.pi * after))
            factor = cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * half
        elif cfg.schedule == "step":
            drops = (count >= 0.5 * steps).astype(jnp.float32) + (count >= 0.75 * steps)
            factor = 10 ** (-0.5 * drops)
        else:
            factor = jnp.ones_like(count)
        return cfg.lr * factor * jnp.minimum(1, (count + 1) / max(1, cfg.warmup_steps))

    return schedule


def trained_paths(cfg: OptimConfig, paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that are trained, sorted.

    Raises:
      UserError: a part under `frozen` or `lr_multipliers` has no parameter, or nothing is left.
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
    """The optimizer over a flat dict of parameters by path.

    In order: clip by the global norm, Adam or Muon, weight decay, learning rate, multipliers.
    """
    scale = {"adamw": optax.scale_by_adam, "muon": scale_by_muon_or_adam}[cfg.algorithm]
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        _kept_in(scale(cfg.b1, cfg.b2, cfg.eps), jnp.dtype(cfg.moments_dtype)),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate(cfg, steps)),
        optax.stateless(lambda updates, _: scale_by_part(updates, cfg.lr_multipliers)),
    )


def decay_mask(params: Mapping[str, jax.Array]) -> dict[str, bool]:
    """True for the parameters that weight decay shrinks."""
    return {path: not NO_DECAY.fullmatch(path) for path in params}


def scale_by_part(updates: Mapping, multipliers: Mapping[str, float]) -> dict:
    """Multiplies updates by the factor of the longest part that their path belongs to."""
    parts = sorted(multipliers, key=len, reverse=True)

    def scaled(path: str, update: jax.Array) -> jax.Array:
        factor = next((multipliers[part] for part in parts if _belongs(path, part)), None)
        return update if factor is None else update * jnp.asarray(factor, update.dtype)

    return {path: scaled(path, update) for path, update in updates.items()}


def _belongs(path: str, part: str) -> bool:
    return path == part or path.startswith(part.rstrip("/") + "/")


def _kept_in(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """Keeps the floating-point state of a transformation in `dtype`; it computes in float32."""
    if dtype == jnp.float32:
        return inner

    def cast(state, to):
        def one(x: jax.Array) -> jax.Array:
            return x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(one, state)

    def init(params):
        return cast(inner.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
