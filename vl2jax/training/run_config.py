"""Run configurations: `configs/*.py` as typed dataclasses that check their values."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from vl2jax.common.paths import user_path
from vl2jax.config import VL2Config
from vl2jax.config.schema import read
from vl2jax.data.source_list import read_sources
from vl2jax.training.optim import OptimConfig
from vl2jax.training.run_limits import check_run
from vl2jax.training.spans import parse_batches, parse_window

_MOST_LINES = 10_000  # of metrics, unless `log_every` is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Shape of the batch of one step.

    Attributes:
      rows: number of rows; a row is one sequence, or several if packed.
      length: tokens per row.
      tiles: number of tile slots, divided evenly among the pools (see `feed.py`); the rows of a
        pool share its slots.  0: a run on text alone, which does not train the parts for images.
      segments: maximum number of samples packed into a row; 1: no packing.
      microbatches: number of microbatches for gradient accumulation; divides `rows` and `tiles`.
    """

    rows: int
    length: int
    tiles: int
    segments: int = 1
    microbatches: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources of the data, and how they are read.

    Attributes:
      train: comma-separated sources, each "synthetic" or a path, optionally with a weight:
        "captions.jsonl=0.7,text.jsonl=0.3".
      heldout: sources of the held-out data, in the same form; "": none.
      images_root: directory of relative image paths; "": the directory of the data file.
      supervise: tokens that count in the loss: "answers" (answers and their end tokens), or "text"
        (questions, too).
      on_error: "raise" stops at a malformed row, "skip" reports it and continues without it.
      too_long: what to do with a row that has more tokens or tiles than a batch has room for:
        "raise" treats it as malformed (see `on_error`), "skip" skips and counts it, "truncate" cuts
        it at its end and counts it.  Truncated are supervised tokens, so the model does not see how
        such answers end; an image is never cut, but dropped with all that follows it.
      max_skipped: maximum share of skipped rows of a source, 0 to 1; more of them stop the run.  It
        is judged on the rows that a data shard has read so far, at least 100.
      skip_batches: batches that are read and passed over, such as "7,40-42"; "": none.  They are
        numbered from 1 in the order of the data, as a run that stops at a batch names it.
      threads: number of threads that read rows and decode images, in each worker process.
      workers: number of worker processes; 0: the threads run in the main process.
      prefetch: number of batches prepared in advance.
      shards: number of data shards, which are read and packed independently, see `feed.py`.  The
        same number gives the same batches with any number of processes.  0: that of the checkpoint
        that the run resumes from; for a new run one per process, as far as the mesh allows.
      preview: number of packed samples to show as text and images before the program stops; 0:
        train.
    """

    train: str = "synthetic"
    heldout: str = ""
    images_root: str = ""
    supervise: str = "answers"
    on_error: str = "raise"
    too_long: str = "raise"
    max_skipped: float = 0.5
    skip_batches: str = ""
    threads: int = 2
    workers: int = 0
    prefetch: int = 2
    shards: int = 0
    preview: int = 0

    @property
    def skipped_batches(self) -> tuple[range, ...]:
        """Ranges of the batches that are passed over.

        Raises:
          UserError: `skip_batches` has another form.
        """
        return parse_batches(self.skip_batches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Load balancing of the experts.

    Attributes:
      aux_loss_alpha: weight of the auxiliary loss; 0: none.
      bias_update_step: u of the auxiliary-loss-free balancing, see `balance.py`; 0: none.
    """

    aux_loss_alpha: float = 0.001
    bias_update_step: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed.  Except for rounding, it does not affect the results.

    Attributes:
      dtype: dtype of activations and matrix products, "float32" or "bfloat16".
      param_dtype: dtype of the parameters, "float32" or "bfloat16".  Updates are computed in
        float32, and bfloat16 parameters are rounded stochastically, see `rounding.py`.
      remat: rematerialisation policy, a key of `model.layers.REMAT`.
      moe_implementation: implementation of the routed experts, one of
        `ops.experts.IMPLEMENTATIONS`.
      ops: implementations to try first, such as "attention=xla,matmul=xla", see `ops.registry`.
      loss_chunk: number of tokens whose logits a device holds at a time.
    """

    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    remat: str = "none"
    moe_implementation: str = "blocked"
    ops: str = ""
    loss_chunk: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; at most one may be -1: all remaining devices."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which ones are kept.

    Attributes:
      every: number of steps between checkpoints.
      keep: number of newest checkpoints to keep.
      keep_every: checkpoints at multiples of this step are never deleted; 0: none.
    """

    every: int = 500
    keep: int = 2
    keep_every: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the held-out data.

    Attributes:
      every: number of steps between evaluations; 0: none.
      batches: maximum number of batches of an evaluation.
    """

    every: int = 200
    batches: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of a training run; see `configs/tiny.py` for an example.

    Attributes:
      name: name of the run; the default workdir is runs/<name>.
      model: architecture in the Hugging Face schema; {}: that of `init_from`.
      init_from: model directory or training workdir with the initial parameters; "": random
        initialisation.
      tokenizer: directory with tokenizer and processor files; "": those of `init_from`, or without
        it those of the synthetic data.
      seed: seed of the initialisation and of the data order.
      steps: number of steps of the run.
      log_every: number of steps between lines of metrics.jsonl and TensorBoard; 0: 1 up to 10,000
        steps, in longer runs as many as give 10,000 lines.  The first step of a start, and those
        that are saved or evaluated, are written too.
      profile: "START:STOP": writes a profiler trace of the steps from START to STOP - 1; "": none.
      dry_run: whether to print the sizes and stop, without allocating anything.
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
    log_every: int = 0
    profile: str = ""
    dry_run: bool = False

    def __post_init__(self):
        check_run(self)
        _ = self.profiled_steps, self.data.skipped_batches  # raises UserError

    @property
    def steps_per_line(self) -> int:
        """Number of steps between lines of the metrics, see `log_every`."""
        return self.log_every or -(-self.steps // _MOST_LINES)

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """First step and last step + 1 of the profiler trace; None: no trace.

        Raises:
          UserError: `profile` has another form.
        """
        return parse_window(self.profile)


def read_run_config(values: Mapping[str, Any]) -> RunConfig:
    """Reads a run configuration.

    Args:
      values: nested mapping, as `ConfigDict.to_dict()` returns it.

    Raises:
      UserError: unknown keys (the message suggests the nearest name), wrong types or values.
    """
    types = typing.get_type_hints(RunConfig)
    read_values = dict(values)
    for name, cls in types.items():
        if dataclasses.is_dataclass(cls) and isinstance(values.get(name), Mapping):
            read_values[name] = read(cls, _with_tuples(values[name]), name, None, inert=_nothing)
    return _with_paths(read(RunConfig, read_values, "", None, inert=_nothing))


def _with_paths(config: RunConfig) -> RunConfig:
    """Checks all paths and converts them, see `user_path`; an empty text stays."""

    def convert(path: str, field: str) -> str:
        return path and str(user_path(path, f"config.{field}"))

    for split in ("train", "heldout"):
        if sources := getattr(config.data, split):
            read_sources(sources, f"data.{split}")
    root = convert(config.data.images_root, "data.images_root")
    return dataclasses.replace(
        config,
        init_from=convert(config.init_from, "init_from"),
        tokenizer=convert(config.tokenizer, "tokenizer"),
        data=dataclasses.replace(config.data, images_root=root),
    )


def read_architecture(config: RunConfig) -> VL2Config | None:
    """The architecture in `config.model`; None if it is to be taken from `init_from`.

    Raises:
      UserError: the architecture is not valid.
    """
    return VL2Config.from_hf(config.model) if config.model else None


def with_balance(architecture: VL2Config, balance: BalanceConfig) -> VL2Config:
    """Returns the architecture with the run's weight of the auxiliary loss."""
    decoder = dataclasses.replace(architecture.decoder, aux_loss_alpha=balance.aux_loss_alpha)
    return dataclasses.replace(architecture, decoder=decoder)


def _nothing(_name: str, _value: Any) -> bool:
    """No field of a run is ignored."""
    return False


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
