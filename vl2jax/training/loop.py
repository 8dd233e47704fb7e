"""The training loop: steps, metrics, evaluations, checkpoints, and stops in good order."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.parallel.processes import (
    is_process_0,
    must_wait_for_steps,
    sync_processes,
    wait_together,
)
from vl2jax.training.events import SKIPPED_FILE, Profile, StopSignal, keep_batch
from vl2jax.training.feed import DeviceBatch, Feed, FeedIterator, fill_metrics
from vl2jax.training.metrics_log import MetricsLog, NoLog, Throughput
from vl2jax.training.report import model_flops
from vl2jax.training.run_config import RunConfig
from vl2jax.training.setup import jit_eval_step, jit_train_step
from vl2jax.training.train_step import Recipe, TrainState
from vl2jax.training.workdir import Workdir

MUST_BE_FINITE = ("train/loss", "train/grad_norm", "train/param_norm")
_RESCUE_SECONDS = 10.0  # after an error, the time in which all processes must agree to save


class NotFiniteError(UserError):
    """A run that diverged: a metric in `MUST_BE_FINITE` is not finite."""


@dataclasses.dataclass
class Step:
    """A dispatched step, which may still run on the devices.

    Attributes:
      number: number of the step.
      state: the state after it, until it is donated to the next step.
      metrics: its metrics; reading them waits for the step.
      device_batch: its batch.
      data_wait: seconds spent waiting for the batch.
      totals: `DeviceBatch.totals` as numbers; None: the step is not waited for yet.
      saved: whether its state was given to the workdir.
    """

    number: int
    state: TrainState
    metrics: dict[str, jax.Array]
    device_batch: DeviceBatch
    data_wait: float
    totals: dict[str, float] | None = None
    saved: bool = False


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
    idle.  It also waits before an evaluation or a save.  A step is saved before it is evaluated.

    The run stops after a signal, or after an error, for example a malformed row.  It first saves
    the newest state, if that is finite and not saved yet.  With several processes, any of them can
    get a signal, or fail to read its data.  It passes the request on with its next batch, so that
    all processes stop after the same step.

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
      UserError: a metric in `MUST_BE_FINITE` is not finite, or data cannot be read.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step_fn, eval_fn = jit_train_step(recipe, mesh, shardings), None
    per_token, per_tile = model_flops(architecture)
    throughput = Throughput(mesh.size, mesh.devices.flat[0].device_kind, config.compute.dtype)
    start, stop = int(state.step), StopSignal()
    say = log.note if is_process_0() else lambda text: None
    span = dict(after=start, last=config.steps)
    profile = Profile(config.profiled_steps, workdir.path / "profile", **span, note=say)
    workdir.on_saved = lambda step: say(f"saved step {step}")

    def finish(step: Step, keep: bool = True) -> bool:
        """Waits for a step and writes its metrics; returns whether a process asked to stop.

        `keep`: write them to the files even if it is not the turn of this step.
        """
        if step.totals is not None:
            return step.totals["stop"] > 0
        metrics = {name: np.asarray(value) for name, value in step.metrics.items()}
        totals = {name: float(value) for name, value in step.device_batch.totals.items()}
        flops = per_token * totals["tokens"] + per_tile * totals["tiles"]
        tokens, images = int(totals["tokens"]), int(totals["images"])
        speed = throughput.step(tokens, images, flops, step.data_wait)
        broken = [name for name in MUST_BE_FINITE if not np.isfinite(metrics[name])]
        keep = keep or bool(broken) or step.number == start + 1
        log.write(
            step.number,
            {**metrics, **speed, **fill_metrics(step.device_batch)},
            keep=keep or step.number % config.steps_per_line == 0,
        )
        if broken:
            value, given = float(metrics[broken[0]]), config.data.skip_batches
            raise NotFiniteError(_not_finite(broken[0], value, step, workdir, given))
        step.totals = totals
        return totals["stop"] > 0

    def save(step: Step) -> None:
        """Saves the state after a step in the background, once its metrics are checked."""
        finish(step)
        if not step.saved:
            workdir.save(
                step.number,
                params=step.state.variables,
                opt_state={"step": step.state.step, "optimizer": step.state.opt_state},
                data_state=batches.get_state(step.device_batch),
            )
            step.saved = True

    newest: Step | None = None  # the newest dispatched step
    alone, asked = jax.process_count() == 1, False
    in_step = must_wait_for_steps(mesh.devices.flat[0].platform)
    failures: list[Exception | None] = []  # errors of the data of this process
    try:
        for number in range(start + 1, config.steps + 1):
            profile.before(number)
            batches.stopping, began = bool(stop.requested), time.perf_counter()
            if alone and not stop.wait(batches.read):  # a signal came before this step
                break
            device_batch = next(batches)
            data_wait = time.perf_counter() - began
            state, metrics = step_fn(state, device_batch.batch)
            before, newest = newest, Step(number, state, metrics, device_batch, data_wait)
            if heldout is not None and eval_fn is None:  # while the step runs, not during a stop
                jitted = jit_eval_step(recipe, mesh, shardings)
                eval_fn = jitted.lower(state.params, state.router, device_batch.batch).compile()
            asked = before is not None and finish(before, keep=False)
            if in_step:
                jax.block_until_ready((metrics, device_batch.totals))
            last = number == config.steps
            evaluating = heldout is not None and (last or number % config.eval.every == 0)
            saving = last or number % config.checkpoint.every == 0
            if evaluating or saving:
                asked = finish(newest) or asked
            # Several processes stop only by what all of them know.
            if stop.requested if alone else asked:
                break
            if saving:
                save(newest)
            if evaluating and heldout is not None:
                scores, failure = evaluate(eval_fn, state, heldout, stop)
                failures.append(failure)
                if scores is None:
                    asked = True
                    break
                log.write(number, scores)
            if evaluating or saving:
                throughput.restart()
            workdir.poll()
            profile.after(number)
        if newest is not None:
            save(newest)
            workdir.wait()
        if failure := next(filter(None, [batches.failure, *failures]), None):
            raise failure
    except BaseException as error:
        if newest is not None and not isinstance(error, NotFiniteError):
            _rescue(newest, save, workdir, log.note)
        raise
    finally:
        profile.close()
        if newest is not None and newest.totals is not None:
            _note_skipped(newest.totals, workdir.path / SKIPPED_FILE, say)
    done = start if newest is None else newest.number
    if stop.requested or asked:
        log.note(f"{stop.requested or 'another process'}: stopped after step {done}")
    sync_processes("end")
    return 0 if workdir.latest_step() == done else 1


def evaluate(
    eval_fn, state: TrainState, heldout: Feed, stop: StopSignal
) -> tuple[dict[str, float] | None, Exception | None]:
    """Evaluates the model on the held-out data.

    Args:
      eval_fn: compiled `jit_eval_step`.
      state: current state.
      heldout: held-out data.
      stop: the signals that end the evaluation.

    Returns:
      Mean loss and token accuracy over all supervised tokens; None if a process was asked to stop
      or could not read its data.  Then the error of this process, or None.

    Raises:
      UserError: no token is supervised.
    """
    totals, alone = np.zeros(3), jax.process_count() == 1
    with contextlib.closing(iter(heldout)) as batches:
        while stop.wait(batches.read) if alone else True:
            device_batch = next(batches, None)
            if device_batch is None:
                break
            if float(device_batch.totals["supervised"]):  # otherwise `eval_step` counts one
                totals += jax.device_get(eval_fn(state.params, state.router, device_batch.batch))
            if float(device_batch.totals["stop"]):
                return None, batches.failure
            batches.stopping = bool(stop.requested)
    if alone and stop.requested:
        return None, None
    if not totals[2]:
        raise UserError(
            "the batches of config.data.heldout have no supervised token; give it valid rows with"
            " answers, or leave it out"
        )
    scores = {"heldout/loss": totals[0] / totals[2], "heldout/token_acc": totals[1] / totals[2]}
    return scores, None


def _rescue(
    step: Step, save: Callable[[Step], None], workdir: Workdir, note: Callable[[str], None]
) -> None:
    """Saves the newest state before an error ends the run, if it is sound; never raises.

    Args:
      step: the newest dispatched step.
      save: saves the state after a step.
      workdir: the workdir.
      note: prints a line.
    """
    problem = ""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(step.state)):
        problem = "its state was given to the next step, which failed"
    elif not step.saved and not wait_together(f"rescue/{step.number}", _RESCUE_SECONDS):
        problem = "the other processes have not stopped after it"
    else:
        try:
            save(step)
            workdir.wait()
        except (UserError, OSError, RuntimeError, MemoryError) as error:  # JAX's: RuntimeError
            problem = str(error).split("\n")[0][:500]
    if problem:
        newest = workdir.latest_step()
        have = "there is no checkpoint" if newest is None else f"the newest checkpoint is {newest}"
        note(f"step {step.number} is not saved: {problem}; {have}")


def _note_skipped(totals: Mapping[str, float], file: Path, note: Callable[[str], None]) -> None:
    """Prints how many rows were skipped or truncated since the beginning of the run, if any."""
    read, skipped, truncated = (
        int(totals[f"rows_{name}"]) for name in ("read", "skipped", "truncated")
    )
    if skipped:
        share = f"skipped {skipped:,} of {read:,} rows ({skipped / max(read, 1):.1%})"
        note(f"{share}, listed in {file}")
    if truncated:
        note(f"truncated {truncated:,} of {read:,} rows")


def _not_finite(name: str, value: float, step: Step, workdir: Workdir, given: str) -> str:
    """Keeps the batch of a step that diverged; returns the error message.

    Args:
      name, value: the metric.
      step: the step.
      workdir: the workdir.
      given: `data.skip_batches` of this run.
    """
    newest, (packed, *_) = workdir.latest_step(), step.device_batch.packed.values()
    rows, number = ", ".join(packed.names[:3]), step.device_batch.number
    try:
        kept = f"is saved in {keep_batch(workdir.path, step.number, step.device_batch)}"
    except OSError as error:
        kept = f"could not be saved ({error.strerror or error})"
    return (
        f"{name} is {value} at step {step.number}, so the run stops; its batch ({rows}, ...)"
        f" {kept}; newest checkpoint: {'none' if newest is None else f'step {newest}'};"
        " try a lower optim.lr, inspect these rows, or go on without them:"
        f" --config.data.skip_batches={','.join(filter(None, [given, str(number)]))}"
    )
