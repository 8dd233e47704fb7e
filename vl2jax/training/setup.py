"""Builds everything that the training loop needs from a run configuration."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.checkpoints.completeness import CHECKPOINTS
from vl2jax.checkpoints.model_dir import MODEL_FILE, flatten, processor_files, read_model_dir
from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.data.files import open_source
from vl2jax.data.packing import BatchShape
from vl2jax.data.pipeline import make_pipeline
from vl2jax.data.row import Source
from vl2jax.data.source_list import SYNTHETIC, read_sources
from vl2jax.data.unread import UnreadKeys
from vl2jax.model.vl2 import DTYPES, VL2, abstract_params
from vl2jax.ops.compiler_options import compiler_options
from vl2jax.parallel.mesh import batch_shards
from vl2jax.parallel.sharding import (
    batch_sharding,
    check_batch,
    optimizer_shardings,
    param_shardings,
)
from vl2jax.processing.processor import Processor
from vl2jax.synthetic import Synthetic
from vl2jax.synthetic.tokens import write_processor_files
from vl2jax.training.config_history import record_start
from vl2jax.training.feed import Feed
from vl2jax.training.lineage import check_workdir, config_differences, prepare
from vl2jax.training.optim import learning_rate, make_optimizer, trained_paths
from vl2jax.training.run_config import RunConfig, read_architecture, with_balance
from vl2jax.training.train_step import Recipe, TrainState, eval_step, new_state, train_step


def choose_architecture(config: RunConfig) -> VL2Config:
    """Returns the architecture of the run, with its weight of the auxiliary loss.

    Raises:
      UserError: neither `model` nor `init_from` is set, or they have different architectures.
    """
    architecture = read_architecture(config)
    if config.init_from:
        found = read_model_dir(config.init_from).config
        differences = [] if architecture is None else config_differences(found, architecture)
        if differences:
            raise UserError(
                f"config.init_from {config.init_from} has another architecture than config.model"
                " (leave config.model empty to use it): " + "; ".join(differences[:8])
            )
        architecture = architecture or found
    if architecture is None:
        raise UserError("the configuration has no model; set config.model or config.init_from")
    return with_balance(architecture, config.balance)


# The parts of the model that only tiles use.  A run on text alone does not train them: they would
# have no gradients, and weight decay alone would shrink them.
IMAGE_PARTS = ("vision", "adaptor", "image_newline", "view_seperator")


def make_recipe(config: RunConfig, architecture: VL2Config, mesh: jax.sharding.Mesh) -> Recipe:
    """Makes the recipe of a train step: model, optimizer and schedule.

    Raises:
      UserError: the mesh does not divide the batch, or the optimizer configuration names parts that
        the model does not have.
    """
    batch = config.batch
    check_batch(mesh, rows=batch.rows, tiles=batch.tiles, microbatches=batch.microbatches)
    compute, optim = config.compute, config.optim
    if not batch.tiles:
        optim = dataclasses.replace(optim, frozen=(*optim.frozen, *IMAGE_PARTS))
    model = VL2(
        architecture,
        dtype=DTYPES[compute.dtype],
        param_dtype=DTYPES[compute.param_dtype],
        moe_implementation=compute.moe_implementation,
        max_segments=batch.segments,
        remat=compute.remat,
        tile_pools=batch_shards(mesh),
    )
    return Recipe(
        model=model,
        optimizer=make_optimizer(config.optim, config.steps),
        schedule=learning_rate(config.optim, config.steps),
        trained=trained_paths(optim, flatten(abstract_params(architecture)["params"])),
        bias_update_step=config.balance.bias_update_step,
        loss_chunk=compute.loss_chunk,
        seed=config.seed,
    )


def state_shapes(recipe: Recipe, mesh: jax.sharding.Mesh) -> TrainState:
    """Returns the train state as `jax.ShapeDtypeStruct` with shardings; nothing is allocated."""
    variables = abstract_params(recipe.model.config, recipe.model.param_dtype)
    shapes = jax.eval_shape(functools.partial(new_state, recipe), variables)
    scalar = optimizer_shardings(mesh, shapes.step)
    shardings = TrainState(
        step=scalar,
        params=param_shardings(mesh, shapes.params),
        router=param_shardings(mesh, shapes.router),
        opt_state=optimizer_shardings(mesh, shapes.opt_state),
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def jit_train_step(recipe: Recipe, mesh: jax.sharding.Mesh, shardings: TrainState) -> Callable:
    """Jits `train_step` for a mesh.

    Args:
      recipe: recipe of the step.
      mesh: mesh of the run; it must be the current mesh (`jax.set_mesh`) when the step is called.
      shardings: shardings of the state.

    Returns:
      (state, batch) -> (state, metrics).  The state is donated; the metrics are replicated.
    """
    return jax.jit(
        functools.partial(train_step, recipe),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=compiler_options(recipe.model.dtype, mesh.devices.flat[0].platform),
    )


def jit_eval_step(recipe: Recipe, mesh: jax.sharding.Mesh, shardings: TrainState) -> Callable:
    """Jits `eval_step` for a mesh, see `jit_train_step`: (params, router, batch) -> sums."""
    return jax.jit(
        functools.partial(eval_step, recipe),
        in_shardings=(shardings.params, shardings.router, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=compiler_options(recipe.model.dtype, mesh.devices.flat[0].platform),
    )


@contextlib.contextmanager
def model_files(path: Path, config: RunConfig, architecture: VL2Config) -> Iterator[Path]:
    """Context manager that gives the directory of the tokenizer and processor files of a run.

    It is the workdir itself once a run has begun, before that `tokenizer` or `init_from`, or
    without them a temporary directory with those of the synthetic data.  The workdir is not
    changed.

    Args:
      path: the workdir.
      config: configuration of the run.
      architecture: architecture of the model.

    Raises:
      UserError: `path` cannot be the workdir of this run, see `lineage.check_workdir`.
    """
    with tempfile.TemporaryDirectory() as made:
        if (path / MODEL_FILE).is_file():
            files = path
        elif config.tokenizer:
            files = processor_files(config.tokenizer)
        elif config.init_from:
            files = read_model_dir(config.init_from).path
        else:
            files = Path(made)
            write_processor_files(files, architecture)
        check_workdir(path, architecture, files, dtype=config.compute.param_dtype)
        yield files


@contextlib.contextmanager
def removed_if_empty(path: Path) -> Iterator[None]:
    """Context manager that removes a workdir made inside it if nothing was written into it."""
    existed = path.exists()
    try:
        yield
    finally:
        if not existed and jax.process_index() == 0:
            for directory in (path / CHECKPOINTS, path):
                with contextlib.suppress(OSError):  # it is not empty, or was not made
                    directory.rmdir()


def write_workdir(
    path: Path, config: RunConfig, architecture: VL2Config, files: Path, step: int
) -> None:
    """Writes model files and configuration into the workdir; call it after all checks.

    Args:
      path: the workdir.
      config: configuration of the run.
      architecture: architecture of the model.
      files: directory of the tokenizer and processor files, see `model_files`.
      step: the step that the run continues after; 0: it begins.
    """
    dropped = read_model_dir(config.init_from).dropped if config.init_from else ()
    dtype = config.compute.param_dtype
    prepare(path, architecture, files, dtype=dtype, dropped=dropped)
    if jax.process_index() == 0:
        record_start(path, config, step)


def make_data(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    processor: Processor,
    on_skip: Callable[[str], None],
    pools: int,
    shards: int = 1,
    *,
    split: str = "train",
    unread: UnreadKeys | None = None,
) -> Feed:
    """Makes the feed of `data.train` (shuffled and repeated) or of `data.heldout` (in order, once).

    Each process reads the rows of its data shards.  Of `data.heldout` it reads what `eval.batches`
    batches need.

    Args:
      config: configuration of the run.
      mesh: mesh over which batches are sharded.
      processor: converts rows to samples.
      on_skip: called with a message for each skipped row.
      pools: number of pools of a microbatch, see `feed.py`.
      shards: number of data shards, see `feed.py`.
      split: "train" or "heldout".
      unread: says keys of rows that are not read; None: says nothing.

    Raises:
      UserError: a source does not exist or is malformed, or a setting is out of range.
    """
    data, batch, training = config.data, config.batch, split == "train"
    names = data.train if training else data.heldout

    def source(name: str) -> Source:
        if name == SYNTHETIC:
            return Synthetic(split, seed=config.seed, lessons=training)
        return open_source(name, images_root=data.images_root or None)

    sources = [(source(name), weight) for name, weight in read_sources(names, f"data.{split}")]
    count = batch.microbatches * pools
    shape = BatchShape(
        count // shards, batch.rows // count, batch.length, batch.tiles // count, batch.segments
    )

    def pipeline(shard: int) -> grain.IterDataset:
        return make_pipeline(
            sources,
            processor,
            shape,
            mask_prompt=data.supervise == "answers",
            seed=config.seed,
            shuffle=training,
            repeat=training,
            on_error=data.on_error,
            too_long=data.too_long,
            max_skipped=data.max_skipped,
            on_skip=on_skip,
            unread=unread,
            threads=data.threads,
            workers=data.workers,
            prefetch=data.prefetch,
            process_index=shard,
            process_count=shards,
            batches=0 if training else config.eval.batches,
        )

    passed_over = data.skipped_batches if training else ()
    return Feed(
        mesh,
        pools,
        shards,
        pipeline,
        ends=not training,
        passed_over=passed_over,
        on_skip=on_skip,
    )


def make_heldout(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    processor: Processor,
    on_skip: Callable[[str], None],
    pools: int,
    shards: int,
    unread: UnreadKeys | None = None,
) -> Feed | None:
    """Makes the feed of the held-out data; None if the run has no evaluation.

    Args:
      config, mesh, processor, on_skip, pools, shards, unread: see `make_data`.
    """
    if not (config.data.heldout and config.eval.every):
        return None
    options: Any = {"split": "heldout", "unread": unread}
    return make_data(config, mesh, processor, on_skip, pools, shards, **options)
