"""A training run's configuration: `configs/*.py` as typed, checked dataclasses."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from vl2jax import ops
from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.config.schema import read
from vl2jax.ops.experts import IMPLEMENTATIONS
from vl2jax.training.optim import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Shape of the data of one step.

    Attributes:
      rows: sequences (or, packed, rows of sequences) per step.
      length: tokens per row.
      tiles: slots for picture tiles per step, shared by the rows of a microbatch.
      segments: most samples packed into one row; 1 packs nothing.
      microbatches: parts that a step works off one after the other; divides rows and tiles.
    """

    rows: int
    length: int
    tiles: int
    segments: int = 1
    microbatches: int = 1

    def __post_init__(self):
        for name in ("rows", "length", "segments", "microbatches"):
            if getattr(self, name) < 1:
                raise UserError(f"batch.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rows", "tiles"):
            if getattr(self, name) % self.microbatches:
                raise UserError(
                    f"batch.microbatches {self.microbatches} must divide batch.{name}"
                    f" {getattr(self, name)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the data comes from.

    Attributes:
      train: sources separated by commas, each `synthetic` or a path, with a weight if there are
        several: "captions.jsonl=0.7,text.jsonl=0.3".
      heldout: the same, for the held-out loss; "" for none.
      images_root: directory that relative picture paths start from; "" for that of the data file.
      supervise: "answers" (answers and their end token) or "text" (questions as well).
      on_error: "raise" stops at a malformed row, "skip" reports and leaves it out.
      threads: that read and decode pictures.
      workers: processes that do it instead; 0 for none.
      prefetch: batches made ahead.
      shards: parts that the data is read and packed in, see `feed`; 0: one per process, and those
        of the checkpoint that a run goes on from. The same number gives the same batches on any
        number of processes.
      preview: shows so many packed samples as text and picture, and stops.
    """

    train: str = "synthetic"
    heldout: str = ""
    images_root: str = ""
    supervise: str = "answers"
    on_error: str = "raise"
    threads: int = 2
    workers: int = 0
    prefetch: int = 2
    shards: int = 0
    preview: int = 0

    def __post_init__(self):
        _one_of("data.supervise", self.supervise, ("answers", "text"))
        _one_of("data.on_error", self.on_error, ("raise", "skip"))
        if self.shards < 0:
            raise UserError(f"data.shards must be 0 or more, got {self.shards}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Balancing of the experts.

    Attributes:
      aux_loss_alpha: weight of the sequence-wise auxiliary loss; 0 is legal.
      bias_update_step: u of the loss-free balancing, for routers with a correction bias.
    """

    aux_loss_alpha: float = 0.001
    bias_update_step: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed; none of it changes what is computed, but for rounding.

    Attributes:
      dtype: of activations and products: "float32" or "bfloat16".
      param_dtype: of the parameters that are trained.
      remat: what is kept for the backward pass, see `layers.REMAT`.
      moe_implementation: of the routed experts, see `ops.experts.IMPLEMENTATIONS`.
      ops: implementations to try first, "attention=xla,matmul=xla", see `ops.registry`.
      loss_chunk: tokens whose logits a device holds at a time.
    """

    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "none"
    moe_implementation: str = "blocked"
    ops: str = ""
    loss_chunk: int = 256

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            _one_of(f"compute.{name}", getattr(self, name), ("float32", "bfloat16"))
        _one_of("compute.moe_implementation", self.moe_implementation, IMPLEMENTATIONS)
        ops.parse(self.ops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; at most one may be -1, which takes those that are left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and which saves stay: the newest `keep`, and every `keep_every`th
    step for ever (0: none)."""

    every: int = 500
    keep: int = 2
    keep_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss: every so many steps (0: never), over so many batches."""

    every: int = 200
    batches: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run; see `configs/tiny.py`.

    Attributes:
      name: of the run; the default working directory is runs/<name>.
      model: architecture in the Hugging Face schema; {} takes that of `init_from`.
      init_from: a converted model or another run's working directory to start from; "" starts
        from random weights.
      tokenizer: a directory with tokenizer and processor files; "" takes those of `init_from`, or
        without it those of the synthetic data.
      seed: of weights and data order.
      steps: in all.
      profile: "START:STOP" writes a trace of these steps.
      dry_run: prints sizes and stops, without allocating anything.
    """

    name: str
    steps: int
    batch: BatchConfig
    optim: OptimConfig
    model: dict = dataclasses.field(default_factory=dict)
    init_from: str = ""
    tokenizer: str = ""
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    profile: str = ""
    dry_run: bool = False

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """(first, last + 1) of the steps to trace."""
        if not self.profile:
            return None
        start, colon, stop = self.profile.partition(":")
        if not (colon and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
            raise UserError(f"profile must be START:STOP, like 10:15, got {self.profile!r}")
        return int(start), int(stop)


def read_run_config(values: Mapping[str, Any]) -> RunConfig:
    """Reads a plain nested mapping, as `ConfigDict.to_dict()` gives.

    Raises:
      UserError: unknown keys (with the nearest name), wrong types or values.
    """
    types = typing.get_type_hints(RunConfig)
    read_values = dict(values)
    for name, cls in types.items():
        if dataclasses.is_dataclass(cls) and isinstance(values.get(name), Mapping):
            read_values[name] = read(cls, _with_tuples(values[name]), name, None)
    return read(RunConfig, read_values, "", None)


def read_architecture(config: RunConfig) -> VL2Config | None:
    """The architecture that the run's `model` describes; None where it is left to `init_from`.

    Raises:
      UserError: it cannot be built.
    """
    return VL2Config.from_hf(config.model) if config.model else None


def with_balance(architecture: VL2Config, balance: BalanceConfig) -> VL2Config:
    """The architecture with the run's weight of the auxiliary loss."""
    decoder = dataclasses.replace(architecture.decoder, aux_loss_alpha=balance.aux_loss_alpha)
    return dataclasses.replace(architecture, decoder=decoder)


def read_sources(text: str, name: str) -> list[tuple[str, float]]:
    """Reads "a.jsonl=0.7,b.json=0.3" into paths and weights; a single one needs no weight.

    Raises:
      UserError: a weight is no number above 0, or there is no source.
    """
    sources = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        path, equals, weight = part.rpartition("=")
        path, weight = (path, weight) if equals else (part, "1")
        try:
            number = float(weight)
        except ValueError:
            number = -1.0
        if not number > 0:
            raise UserError(f"{name}: {part!r} must be PATH=WEIGHT with a weight above 0")
        sources.append((path, number))
    if not sources:
        raise UserError(f"{name} names no source; expected 'synthetic' or the path of a data file")
    return sources


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
