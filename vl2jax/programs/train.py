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
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from vl2jax import ops
from vl2jax.cli.command import run_cli
from vl2jax.cli.train_flags import FLAGS, define_flags, read_distributed_options, read_flags
from vl2jax.common.compilation_cache import set_compilation_cache
from vl2jax.common.errors import UserError
from vl2jax.common.paths import local_path
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
    must_wait_for_steps,
    sync_processes,
)
from vl2jax.parallel.sharding import make_mesh
from vl2jax.processing.processor import Processor
from vl2jax.training.events import Profile, Skipped, StopSignal, keep_batch
from vl2jax.training.feed import DeviceBatch, Feed, FeedIterator, choose_pools, fill_metrics
from vl2jax.training.lineage import init_params
from vl2jax.training.metrics_log import MetricsLog, NoLog, Throughput
from vl2jax.training.report import describe_run, model_flops
from vl2jax.training.run_config import RunConfig, read_run_config
from vl2jax.training.setup import (
    choose_architecture,
    jit_eval_step,
    jit_train_step,
    make_data,
    make_heldout,
    make_recipe,
    prepare_workdir,
    state_shapes,
)
from vl2jax.training.train_step import Recipe, TrainState, init_state, new_state
from vl2jax.training.workdir import Workdir

MUST_BE_FINITE = ("train/loss", "train/grad_norm", "train/param_norm")


def run(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
      argv: the command line, with the name of the program.

    Returns:
      The exit code.
    """
    config = read_run_config(read_flags(argv))
    path = Path("runs", config.name)
    if FLAGS.workdir is not None:
        path = local_path(FLAGS.workdir, "--workdir")
    with distributed(read_distributed_options()):
        assert_equal_across_processes(dataclasses.asdict(config) | {"workdir": str(path)})
        mesh = make_mesh(dataclasses.asdict(config.mesh))
        with jax.set_mesh(mesh), ops.use(**ops.parse(config.compute.ops)):
            return run_on_mesh(config, path, mesh)


def run_on_mesh(config: RunConfig, path: Path, mesh: jax.sharding.Mesh) -> int:
    """Trains on the current mesh.

    Args:
      config: configuration of the run.
      path: the workdir.
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
    prepare_workdir(path, config, architecture)
    sync_processes("workdir")
    processor = Processor.from_dir(path, architecture)
    skipped = Skipped(path / "skipped.txt")
    if config.data.preview:
        shown = make_data(config, mesh, processor, skipped, batch_shards(mesh)).pipelines
        preview(iter(shown[0]), processor, path, config.data.preview)
        return 0
    keep = config.checkpoint
    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(
            Workdir(path, keep=keep.keep, keep_every=keep.keep_every or None)
        )
        state, data_state = first_state(config, architecture, recipe, shapes, workdir)
        pools, shards = choose_pools(mesh, config.batch, config.data.shards, data_state)
        recipe = dataclasses.replace(recipe, model=recipe.model.clone(tile_pools=pools))
        batches = iter(make_data(config, mesh, processor, skipped, pools, shards))
        stack.enter_context(contextlib.closing(batches))
        if data_state is not None:
            batches.set_state(data_state)
        log: MetricsLog | NoLog = NoLog()
        if is_process_0():
            log = MetricsLog(path, total_steps=config.steps, start_step=int(state.step))
        stack.enter_context(log)
        workdir.on_error = skipped.note = log.note
        heldout = make_heldout(config, mesh, processor, skipped, pools, shards)
        return train(config, architecture, recipe, mesh, state, batches, heldout, workdir, log)


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
            print(f"resumed  from step {step} of {workdir.path}", flush=True)
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


@dataclasses.dataclass
class InFlightStep:
    """A dispatched step, which may still run on the devices.

    Attributes:
      step: number of the step.
      metrics: its metrics; reading them waits for the step.
      device_batch: its batch.
      data_wait: seconds spent waiting for the batch.
    """

    step: int
    metrics: dict[str, jax.Array]
    device_batch: DeviceBatch
    data_wait: float


def train(
    config: RunConfig,
    architecture: VL2Config,
    recipe: Recipe,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    batches: FeedIterator,
    heldout: Feed | None,
    workdir: Workdir,
    log: MetricsLog | NoLog,
) -> int:
    """Runs the training loop.

    The loop dispatches a step before it waits for the previous one, so that the devices do not
    idle.  It also waits before an evaluation or a save.  With several processes, any of them can
    get a signal to stop.  It passes the request on with its next batch, so that all processes stop
    after the same step.

    Args:
      config: configuration of the run.
      architecture: architecture of the model.
      recipe: recipe of the step.
      mesh: the current mesh.
      state: state to start from.
      batches: training batches.
      heldout: held-out batches; None: no evaluation.
      workdir: the workdir.
      log: log of the metrics.

    Returns:
      The exit code: 0 if the last step is saved, otherwise 1.

    Raises:
      UserError: a metric in `MUST_BE_FINITE` is not finite.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn = jit_train_step(recipe, mesh, shardings)
    eval_fn = jit_eval_step(recipe, mesh, shardings)
    per_token, per_tile = model_flops(architecture)
    throughput = Throughput(mesh.size, mesh.devices.flat[0].device_kind, config.compute.dtype)
    stop, profile = StopSignal(), Profile(config.profiled_steps, workdir.path / "profile")

    def finish(in_flight: InFlightStep, scores: Callable[[], dict[str, float]] = dict) -> bool:
        """Waits for a step and writes its metrics; returns whether a process asked to stop."""
        metrics = {name: np.asarray(value) for name, value in in_flight.metrics.items()}
        totals = {name: float(value) for name, value in in_flight.device_batch.totals.items()}
        flops = per_token * totals["tokens"] + per_tile * totals["tiles"]
        tokens, images = int(totals["tokens"]), int(totals["images"])
        speed = throughput.step(tokens, images, flops, in_flight.data_wait)
        broken = [name for name in MUST_BE_FINITE if not np.isfinite(metrics[name])]
        more = {} if broken else scores()
        log.write(
            in_flight.step, {**metrics, **speed, **fill_metrics(in_flight.device_batch), **more}
        )
        if broken:
            kept = keep_batch(workdir.path, in_flight.step, in_flight.device_batch)
            raise UserError(
                _not_finite(broken[0], float(metrics[broken[0]]), in_flight, kept, workdir)
            )

        return totals["stop"] > 0

    def heldout_scores() -> dict[str, float]:
        return {} if heldout is None else evaluate(eval_fn, state, heldout)

    in_flight: InFlightStep | None = None
    alone, in_step = jax.process_count() == 1, must_wait_for_steps(mesh.devices.flat[0].platform)
    for step in range(int(state.step) + 1, config.steps + 1):
        profile.before(step)
        started = time.perf_counter()
        batches.stopping = bool(stop.requested)
        device_batch = next(batches)
        data_wait = time.perf_counter() - started
        state, metrics = step_fn(state, device_batch.batch)
        asked = in_flight is not None and finish(in_flight)
        in_flight = InFlightStep(step, metrics, device_batch, data_wait)
        if in_step:
            jax.block_until_ready((metrics, device_batch.totals))
        # Read the signal only once; one that arrives later stops the run after the next step.
        stopping = stop.requested if alone else asked and (stop.requested or "another process")
        last = step == config.steps or bool(stopping)
        evaluating = heldout is not None and (step % config.eval.every == 0 or last)
        saving = step % config.checkpoint.every == 0 or last
        if evaluating or saving:
            finish(in_flight, heldout_scores if evaluating else dict)
            in_flight = None
        if saving:
            workdir.save(
                step,
                params=state.variables,
                opt_state={"step": state.step, "optimizer": state.opt_state},
                data_state=batches.get_state(),
            )
        if evaluating or saving:
            throughput.restart()
        workdir.poll()
        profile.after(step)
        if stopping:
            log.note(f"{stopping}: saved step {step}, stopping")
            break
    workdir.wait()
    sync_processes("end")
    return 0 if workdir.latest_step() == int(state.step) else 1


def evaluate(eval_fn, state: TrainState, heldout: Feed) -> dict[str, float]:
    """Evaluates the model on the held-out data.

    Args:
      eval_fn: `jit_eval_step`.
      state: current state.
      heldout: held-out data.

    Returns:
      Mean loss and token accuracy over all supervised tokens.

    Raises:
      UserError: no token is supervised.
    """
    totals = np.zeros(3)
    with contextlib.closing(iter(heldout)) as batches:
        for device_batch in batches:
            if float(device_batch.totals["supervised"]):  # otherwise `eval_step` counts one
                totals += jax.device_get(eval_fn(state.params, state.router, device_batch.batch))
    if not totals[2]:
        raise UserError(
            "the batches of config.data.heldout have no supervised token; give it valid rows with"
            " answers, or leave it out"
        )
    return {"heldout/loss": totals[0] / totals[2], "heldout/token_acc": totals[1] / totals[2]}


def _not_finite(
    name: str, value: float, in_flight: InFlightStep, kept: Path, workdir: Workdir
) -> str:
    """The error message of a run that diverged."""
    newest, (packed, *_) = workdir.latest_step(), in_flight.device_batch.packed.values()
    rows = ", ".join(packed.names[:3])
    return (
        f"{name} is {value} at step {in_flight.step}, so the run stops; its batch ({rows}, ...) is"
        f" saved in {kept}; newest checkpoint: {'none' if newest is None else f'step {newest}'};"
        " try a lower optim.lr, or inspect these rows"
    )


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
