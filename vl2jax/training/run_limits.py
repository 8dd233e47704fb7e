"""What each field of a run configuration may be: the ranges of numbers, and the choices of names.

All of it is checked before anything is read, compiled or written.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vl2jax import ops
from vl2jax.common.errors import UserError, clip, joined, shown
from vl2jax.config.ranges import Range, at_least, outside
from vl2jax.model.layers import REMAT
from vl2jax.ops.experts import IMPLEMENTATIONS
from vl2jax.training.optim import ALGORITHMS, SCHEDULES

_FRACTION = Range(0, 1)
_MOMENT = Range(0, 1, below=True)

# Range of each number of a run, by section; "" is `RunConfig` itself.
RANGES: Mapping[str, Mapping[str, Range]] = {
    "": {"seed": Range(0, 2**32 - 1), "steps": at_least(1), "log_every": at_least(0)},
    "batch": {
        "rows": Range(1, 2**20),
        "length": Range(2, 2**24),
        "tiles": Range(0, 2**20),
        "segments": Range(1, 2**16),
        "microbatches": Range(1, 2**20),
    },
    "data": {
        "max_skipped": _FRACTION,
        "threads": Range(1, 1024),
        "workers": Range(0, 1024),
        "prefetch": Range(1, 1024),
        "shards": Range(0, 2**20),
        "preview": Range(0, 10_000),
    },
    "optim": {
        "lr": Range(0, 1e3, above=True),
        "warmup_steps": at_least(0),
        "final_lr_fraction": _FRACTION,
        "weight_decay": Range(0, 1e3),
        "b1": _MOMENT,
        "b2": _MOMENT,
        "eps": Range(0, 1, above=True),
        "clip_norm": Range(0, 1e30, above=True),
    },
    "balance": {"aux_loss_alpha": Range(0, 1e3), "bias_update_step": _FRACTION},
    "compute": {"loss_chunk": Range(1, 2**24)},
    "mesh": dict.fromkeys(("data", "fsdp", "expert", "tensor"), Range(-1, 2**20)),
    "checkpoint": {"every": at_least(1), "keep": at_least(1), "keep_every": at_least(0)},
    "eval": {"every": at_least(0), "batches": at_least(1)},
}

# Values of each field that has few of them.
CHOICES: Mapping[str, Mapping[str, Collection[str]]] = {
    "data": {
        "supervise": ("answers", "text"),
        "on_error": ("raise", "skip"),
        "too_long": ("raise", "skip", "truncate"),
    },
    "optim": {
        "algorithm": ALGORITHMS,
        "schedule": SCHEDULES,
        "moments_dtype": ("float32", "bfloat16"),
    },
    "compute": {
        "dtype": ("float32", "bfloat16"),
        "param_dtype": ("float32", "bfloat16"),
        "remat": tuple(REMAT),
        "moe_implementation": IMPLEMENTATIONS,
    },
}

_MULTIPLIER = Range(0, 1e6)
_MOST_TOKENS = 2**31 - 1  # of a batch; int32 counts them


def check_run(config: Any) -> None:
    """Checks all fields of a `RunConfig`.

    Raises:
      UserError: fields are outside their range, or not among their choices; lists all of them.
    """
    sections = {name: getattr(config, name) if name else config for name in {**RANGES, **CHOICES}}
    problems = [
        *(text for name, part in sections.items() for text in _outside(part, name)),
        *(text for name, part in sections.items() for text in _not_chosen(part, name)),
    ]
    if problems:
        raise UserError(joined(problems))
    _check_multipliers(config.optim.lr_multipliers)
    _check_batch(config.batch)
    ops.parse(config.compute.ops)
    if config.name != Path(config.name).name or config.name in ("", "..") or len(config.name) > 200:
        raise UserError(f"name must be a name without '/', got {shown(config.name)}")


def _outside(part: Any, section: str) -> list[str]:
    return outside(part, RANGES.get(section, {}), section)


def _not_chosen(part: Any, section: str) -> list[str]:
    return [
        f"{section}.{name} must be one of {', '.join(allowed)}, got {shown(getattr(part, name))}"
        for name, allowed in CHOICES.get(section, {}).items()
        if getattr(part, name) not in allowed
    ]


def _check_multipliers(multipliers: Mapping[str, Any]) -> None:
    for name, factor in multipliers.items():
        if isinstance(factor, bool) or factor not in _MULTIPLIER:
            what = f"optim.lr_multipliers.{clip(str(name), 60)}"
            raise UserError(f"{what} must be {_MULTIPLIER}, got {shown(factor)}")


def _check_batch(batch: Any) -> None:
    for name in ("rows", "tiles"):
        if getattr(batch, name) % batch.microbatches:
            raise UserError(
                f"batch.microbatches {batch.microbatches} must divide batch.{name}"
                f" {getattr(batch, name)}"
            )
    if batch.rows * batch.length > _MOST_TOKENS:
        raise UserError(
            f"batch.rows {batch.rows} x batch.length {batch.length} is more than {_MOST_TOKENS}"
            " tokens; give fewer"
        )
