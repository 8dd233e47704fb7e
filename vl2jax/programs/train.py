"""Trains DeepSeek-VL2.

    python train.py --config=configs/tiny.py
    python train.py --config=configs/vl2_tiny.py:sft --config.init_from=ckpt/tiny \\
        --config.data.train=conversations.json --workdir=runs/mine
    python train.py --config=FILE --config.data.preview=4       # show packed samples and stop
    python train.py --config=FILE --config.dry_run=True         # print sizes and stop

Every field of the configuration is a flag, for example --config.optim.lr=1e-4.  To resume an
interrupted run from the newest checkpoint in its workdir, run the same command again.
"""

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from vl2jax import ops
from vl2jax.cli.command import run_cli
from vl2jax.cli.train_flags import FLAGS, define_flags, read_distributed_options, read_flags
from vl2jax.common.compilation_cache import set_compilation_cache
from vl2jax.common.paths import AnyPath, user_path
from vl2jax.config import VL2Config
from vl2jax.data.preview import preview
from vl2jax.data.source_list import read_sources
from vl2jax.model.vl2 import DTYPES
from vl2jax.ops.compiler_options import run_once_options
from vl2jax.parallel.mesh import batch_shards
from vl2jax.parallel.processes import (
    assert_equal_across_processes,
    distributed,
    exit_process,
    is_process_0,
    sync_processes,
)
from vl2jax.parallel.sharding import make_mesh
from vl2jax.processing.processor import Processor
from vl2jax.training.config_history import config_changes
from vl2jax.training.events import SKIPPED_FILE, Skipped
from vl2jax.training.feed import choose_pools
from vl2jax.training.lineage import init_params
from vl2jax.training.loop import train
from vl2jax.training.metrics_log import MetricsLog, NoLog
from vl2jax.training.mirror import mirrored
from vl2jax.training.remote_workdir import open_workdir
from vl2jax.training.report import describe_run
from vl2jax.training.run_config import RunConfig, read_run_config
from vl2jax.training.setup import (
    choose_architecture,
    make_data,
    make_heldout,
    make_recipe,
    model_files,
    removed_if_empty,
    state_shapes,
    write_workdir,
)
from vl2jax.training.train_step import Recipe, TrainState, init_state, new_state
from vl2jax.training.workdir import Workdir


def run(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
      argv: the command line, with the name of the program.

    Returns:
      The exit code.
    """
    config = read_run_config(read_flags(argv))
    path: AnyPath = Path("runs", config.name)
    if FLAGS.workdir is not None:
        path = user_path(FLAGS.workdir, "--workdir")
    with distributed(read_distributed_options()):
        assert_equal_across_processes(dataclasses.asdict(config) | {"workdir": str(path)})
        mesh = make_mesh(dataclasses.asdict(config.mesh))
        with jax.set_mesh(mesh), ops.use(**ops.parse(config.compute.ops)):
            return run_on_mesh(config, path, mesh)


def run_on_mesh(config: RunConfig, path: AnyPath, mesh: jax.sharding.Mesh) -> int:
    """Trains on the current mesh.

    Args:
      config: configuration of the run.
      path: the workdir, local or on an object store.
      mesh: the current mesh.

    Returns:
      The exit code.
    """
    architecture = choose_architecture(config)
    recipe = make_recipe(config, architecture, mesh)
    shapes = state_shapes(recipe, mesh)
    if is_process_0():
        print(describe_run(config, architecture, mesh, shapes, recipe.trained), flush=True)
    if config.dry_run:
        return 0
    read_sources(config.data.train, "data.train")  # reports an error before files are written
    set_compilation_cache(FLAGS.compilation_cache)
    with contextlib.ExitStack() as stack:
        mirror = stack.enter_context(mirrored(path))
        path = mirror.path
        skipped = Skipped(path / SKIPPED_FILE)
        files = stack.enter_context(model_files(path, config, architecture))
        processor = Processor.from_dir(files, architecture)
        if config.data.preview:
            show_data(config, path, mesh, processor)
            return 0
        # Nothing is written into the workdir before it is locked and everything is checked.
        stack.enter_context(removed_if_empty(path))
        keep = config.checkpoint
        workdir = stack.enter_context(
            open_workdir(mirror, keep=keep.keep, keep_every=keep.keep_every or None)
        )
        if is_process_0():
            print_changes(config_changes(path, config))
        state, data_state = first_state(config, architecture, recipe, shapes, workdir)
        pools, shards = choose_pools(mesh, config.batch, config.data.shards, data_state)
        recipe = dataclasses.replace(recipe, model=recipe.model.clone(tile_pools=pools))
        data = (config, mesh, processor, skipped, pools, shards)
        batches = iter(make_data(*data, unread=skipped.unread))
        stack.enter_context(contextlib.closing(batches))
        if data_state is not None:
            # Checkpoints of earlier versions have no number of batches; it was the step.
            batches.set_state({"batches": int(state.step)} | data_state)
        heldout = make_heldout(*data, unread=skipped.unread)
        sync_processes("checked")
        write_workdir(path, config, architecture, files, int(state.step))
        sync_processes("workdir")
        log: MetricsLog | NoLog = NoLog()
        if is_process_0():
            log = MetricsLog(path, total_steps=config.steps, start_step=int(state.step))
        stack.enter_context(log)
        workdir.on_error = skipped.note = log.note
        return train(config, architecture, recipe, mesh, state, batches, heldout, workdir, log)


def show_data(config: RunConfig, path: Path, mesh: jax.sharding.Mesh, processor: Processor) -> None:
    """Shows packed samples of the training data, see `data.preview`; process 0 does it alone.

    Args:
      config: configuration of the run.
      path: the workdir; only preview.png is written into it.
      mesh: the current mesh.
      processor: makes samples of rows.
    """
    if is_process_0():
        skipped, parts = Skipped(None), batch_shards(mesh)
        shown = make_data(config, mesh, processor, skipped, parts, unread=skipped.unread)
        preview(iter(shown.pipelines[0]), processor, path, config.data.preview)


def print_changes(changes: Sequence[str], most: int = 20) -> None:
    """Prints the fields of the configuration that differ from those of the last start."""
    for change in changes[:most]:
        print(f"changed  {change}")
    if len(changes) > most:
        print(f"changed  {len(changes) - most} more fields, see config.json")
    sys.stdout.flush()


def first_state(
    config: RunConfig,
    architecture: VL2Config,
    recipe: Recipe,
    shapes: TrainState,
    workdir: Workdir,
) -> tuple[TrainState, dict | None]:
    """Makes the state that the run starts from.

    The newest checkpoint of the workdir comes first, then the parameters of `init_from`, then
    random parameters.

    Args:
      config: configuration of the run.
      architecture: architecture of the model.
      recipe: recipe of the step.
      shapes: shapes and shardings of the state.
      workdir: the workdir.

    Returns:
      The train state, and the state of the data; None if the data starts from the beginning.
    """
    if workdir.latest_step() is not None:
        step, variables, rest, data_state = workdir.restore(
            like_params=shapes.variables,
            like_opt_state={"step": shapes.step, "optimizer": shapes.opt_state},
        )
        if is_process_0():
            print(f"resumed  from step {step} of {workdir.home}", flush=True)
        params, router = variables["params"], variables["router"]
        return TrainState(rest["step"], params, router, rest["optimizer"]), data_state
    shardings = jax.tree.map(lambda shape: shape.sharding, shapes)
    if not config.init_from:
        init = jax.jit(
            init_state,
            static_argnums=0,
            out_shardings=shardings,
            compiler_options=run_once_options(),
        )
        return init(recipe, jax.random.key(config.seed)), None
    variables = init_params(
        config.init_from,
        shapes.variables,
        shardings.variables,
        DTYPES[config.compute.param_dtype],
        config=architecture,
    )
    new = jax.jit(new_state, static_argnums=0, out_shardings=shardings, donate_argnums=1)
    return new(recipe, variables), None


def main(argv: Sequence[str]) -> int:
    """Entry point of the command line.

    Returns:
      The exit code: 0, 1 after an error, 130 after Ctrl-C.
    """
    code = run_cli(
        lambda: run(argv),
        out_of_memory="--config.compute.remat=full, more --config.batch.microbatches, or a smaller"
        " --config.batch.rows",
    )
    return exit_process(code)


def script() -> int:
    """Runs `train.py` or `vl2jax-train` with the command line of this process."""
    gc.freeze()  # so that garbage collections skip the objects that the imports created
    define_flags(__doc__)
    return main(sys.argv)
