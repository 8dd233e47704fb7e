"""Compiles a run for TPUs without having them: does it fit, and what limits its speed?

    python -m vl2jax.plan --config=configs/vl2_base.py:sft --topology=v5p:4x4x4 \\
        --config.mesh.expert=8 --what=train,decode --json

It compiles the same programs that `train.py` and `sample.py` run.  It needs libtpu:
pip install "vl2jax[tpu]".
"""

import dataclasses
import json
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from vl2jax import ops
from vl2jax.cli.command import run_cli
from vl2jax.cli.train_flags import FLAGS, define_flags, read_flags
from vl2jax.common.chips import TPU
from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.steps import MAX_BURST
from vl2jax.model.quantization import KINDS
from vl2jax.ops.experts.tpu_chunked import CHUNKS, SCOPE
from vl2jax.ops.experts.xla import ACTIVE, BLOCKS, block_rows
from vl2jax.parallel.mesh import batch_shards
from vl2jax.parallel.sharding import make_mesh
from vl2jax.plan.cross_check import check_products, check_total
from vl2jax.plan.hlo import Cost, analyse
from vl2jax.plan.kernel_costs import kernel_cost
from vl2jax.plan.programs import (
    CompiledProgram,
    GenerationSizes,
    build_decode,
    build_prefill,
    build_train,
    tpu_devices,
)
from vl2jax.plan.torus import collective_seconds, find_chip
from vl2jax.training.report import model_flops
from vl2jax.training.run_config import RunConfig, read_run_config
from vl2jax.training.setup import choose_architecture

_MOST = 2**24  # rows or tokens
WHAT = ("train", "prefill", "decode")
# Effort of the compiler; -1 takes half the time and gives nearly the same program.
EFFORT = "jax_exec_time_optimization_effort"


def plan(
    config: RunConfig,
    topology: str,
    what: str,
    request: GenerationSizes,
) -> dict:
    """Compiles a program and computes its costs.

    Args:
      config: configuration of the run; `prefill` and `decode` use only its model, dtype and mesh.
      topology: TPU slice, such as `v5p:4x4x4`.
      what: program, one of `WHAT`.
      request: sizes of `prefill` and `decode`.

    Returns:
      Sizes in bytes and times in seconds, per device; `describe` explains them.

    Raises:
      UserError: the program does not fit in memory, or the mesh does not fit the slice.
      ValueError: the counts of the program contradict XLA's.
    """
    chip, devices = find_chip(topology), tpu_devices(topology)
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    architecture = choose_architecture(config)
    if what == "train":
        built = build_train(config, architecture, mesh)
    else:
        build = {"prefill": build_prefill, "decode": build_decode}[what]
        built = build(config, architecture, mesh, request)
    check_products(built.text)
    check_total(built.text, built.xla_flops)
    tokens, flops = work(config, architecture, what, request)
    # A train step computes one microbatch at a time, and a burst one token per row at a time.
    parts = {"train": config.batch.microbatches, "decode": MAX_BURST}.get(what, 1)
    decoder = architecture.decoder
    chosen, routed = decoder.num_experts_per_tok or 0, decoder.n_routed_experts or 0
    rows = config.batch.rows // parts if what == "train" else request.rows
    trips = expert_trips(mesh, rows, tokens // parts, chosen, routed)
    cost = analyse(
        built.text,
        open_trips=lambda origin: _open_trips(config, origin, trips, batch_shards(mesh)),
        kernel_cost=kernel_cost(
            tokens / parts * chosen / batch_shards(mesh),
            routed // mesh.shape["expert"],
        ),
    )
    cores = len(devices) // len({tuple(device.coords) for device in devices})
    rates = dataclasses.replace(
        chip, hbm=chip.hbm / cores, flops=chip.flops / cores, bandwidth=chip.bandwidth / cores
    )
    if built.peak > rates.hbm:
        raise UserError(
            f"does not fit: {built.peak / 2**30:.1f} of {rates.hbm / 2**30:.0f} GiB on each chip"
        )
    return {
        "what": what,
        "config": config.name,
        "topology": topology,
        **({} if request.quantize is None else {"quantize": request.quantize}),
        **({} if what != "decode" else {"sampling": _sampling_name(request.sampling)}),
        "devices": len(devices),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        **_report(rates, mesh, built, cost, flops / len(devices)),
        "tokens": tokens,
    }


def _sampling_name(sampling: SamplingParams) -> str:
    """The form of sampling that a decode program is compiled with."""
    if sampling.greedy:
        return "greedy"
    return "top-k and top-p" if sampling.truncates else "all tokens"


def work(config: RunConfig, architecture: VL2Config, what: str, request: GenerationSizes):
    """Tokens of the decoder in one run of a program, and the FLOPs that the model needs for them.

    A train step needs six FLOPs per activated parameter, a forward pass two; see
    `report.model_flops`.
    """
    per_token, per_tile = model_flops(architecture)
    if what == "train":
        batch = config.batch
        tokens = batch.rows * batch.length
        return tokens, per_token * tokens + per_tile * batch.tiles
    tokens = request.rows * (request.prompt if what == "prefill" else MAX_BURST)
    head = 2.0 * architecture.decoder.hidden_size * architecture.decoder.vocab_size
    return tokens, tokens * (per_token / 3 - (head if what == "prefill" else 0))


def expert_trips(mesh: Mesh, rows: int, tokens: int, chosen: int, routed: int) -> tuple[int, int]:
    """Trip counts of the loops of `ops/experts/xla.py` on a device, with a balanced load.

    Args:
      mesh: the mesh.
      rows: rows of the batch.
      tokens: tokens of the batch.
      chosen: experts per token.
      routed: number of experts.

    Returns:
      Number of experts that have tokens, and of blocks of rows of each; the tokens choose as many
      different experts as they can.
    """
    if not routed:
        return 0, 0
    shards, width = batch_shards(mesh), mesh.shape["expert"]
    exchanged = rows % shards == 0 or (tokens % shards == 0 and tokens >= shards * shards)
    held = tokens * width // shards if exchanged else tokens  # tokens that a device goes through
    active = -(-min(tokens * chosen, routed) // width)
    of_expert = -(-held * chosen // (width * active))
    return active, -(-of_expert // block_rows(held * chosen, routed // width))


def _open_trips(config: RunConfig, origin: str, experts: tuple[int, int], shards: int):
    """The assumed trip count of a loop whose trip count depends on the data; None: not known.

    A decode burst is complete.  The loss has supervised tokens in all blocks of a device's rows
    (the batch has `shards` parts).  The load of the experts is balanced, see `expert_trips`.
    """
    if SCOPE in origin:
        return CHUNKS
    if ACTIVE in origin:
        return experts[1] if BLOCKS in origin else experts[0]
    if origin == "jit(burst)/while":
        return MAX_BURST
    if "jvp()" in origin:
        batch, chunk = config.batch, config.compute.loss_chunk
        rows = batch.rows // batch.microbatches // shards
        return -(-batch.length // min(max(chunk // rows, 1), batch.length))
    return None


def _report(chip: TPU, mesh: Mesh, built: CompiledProgram, cost: Cost, model: float) -> dict:
    """Memory, FLOPs, collectives and roofline of one device."""
    where = [device.coords for device in mesh.devices.flat]
    kinds: dict[str, dict[str, float]] = {}
    links = 0.0
    for collective in cost.collectives:
        if len(collective.group) < 2:
            continue
        seconds = collective.count * collective_seconds(chip, where, collective)
        links += seconds
        name = f"{collective.kind} over {_axes(mesh, collective.group)}"
        kind = kinds.setdefault(name, {"count": 0, "bytes": 0, "seconds": 0.0})
        kind["count"] += round(collective.count)
        kind["bytes"] += round(collective.count * collective.sent)
        kind["seconds"] += seconds
    bound = {
        "compute": cost.flops / chip.flops,
        "memory": cost.traffic / chip.bandwidth,
        "links": links,
    }
    binding = max(bound, key=lambda name: bound[name])
    return {
        "bytes": {**built.kept, "temporaries": built.temporaries, "peak": built.peak},
        "hbm": int(chip.hbm),
        "flops": cost.flops,
        "model_flops": model,
        "traffic": round(cost.traffic),
        "collectives": kinds,
        "roofline": {**bound, "binding": binding, "step": bound[binding]},
        "mfu_bound": model / chip.flops / bound[binding] if bound[binding] else 0.0,
        "compile_seconds": round(built.seconds, 1),
        "open_loops": list(cost.open_loops),
        "unknown_kernels": list(cost.unknown_kernels),
    }


def _axes(mesh: Mesh, group: tuple[int, ...]) -> str:
    """Names of the mesh axes along which the devices of a group differ."""
    places = np.unravel_index(group, mesh.devices.shape)
    differ = [len(set(place.tolist())) > 1 for place in places]
    return "+".join(name for name, does in zip(mesh.axis_names, differ, strict=True) if does)


def describe(found: dict) -> str:
    """Formats the result of `plan` as plain text."""
    gib = 2.0**30
    size, bound, mesh = found["bytes"], found["roofline"], found["mesh"]
    axes = ", ".join(f"{name} {n}" for name, n in mesh.items() if n > 1) or "one device"
    memory = ", ".join(f"{name} {n / gib:.2f}" for name, n in size.items() if name != "peak")
    moved = "; ".join(
        f"{kind} {n['count']}x {n['bytes'] / 1e9:.3g} GB"
        for kind, n in found["collectives"].items()
    )
    times = ", ".join(f"{name} {bound[name]:.3g}" for name in ("compute", "memory", "links"))
    ratio = found["flops"] / found["model_flops"]
    lines = {
        "program": f"{found['what']} of {found['config']} on {found['topology']}"
        f" ({found['devices']} devices: {axes})",
        "memory": f"peak {size['peak'] / gib:.2f} of {found['hbm'] / gib:.0f} GiB per device"
        f" ({memory} GiB)",
        "work": f"{found['flops']:.3g} FLOPs per device, {ratio:.2f} times those of the model"
        f" ({found['model_flops']:.3g}); {found['traffic'] / 1e9:.3g} GB of HBM traffic",
        "sent": moved or "nothing",
        "step": f"at least {bound['step']:.3g} s, bound by {bound['binding']} ({times} s);"
        f" {found['tokens'] / bound['step']:,.0f} tokens/s, MFU at most"
        f" {100 * found['mfu_bound']:.0f}%",
        "compiled": f"in {found['compile_seconds']} s",
    }
    for name, text in (
        ("open_loops", "loops counted once"),
        ("unknown_kernels", "kernels not counted"),
    ):
        if found[name]:
            lines[text] = ", ".join(found[name])
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def define_plan_flags() -> None:
    """Defines the flags of `train.py` and those of this program."""
    define_flags(__doc__)
    flags.DEFINE_string("topology", None, "TPU slice, such as v5p:4x4x4 or v5e:2x4")
    flags.DEFINE_list("what", ["train"], f"programs: {', '.join(WHAT)}")
    flags.DEFINE_integer("rows", 8, "batch size of prefill and decode", 1, _MOST)
    flags.DEFINE_integer("prompt", 2048, "tokens of a prompt", 1, _MOST)
    flags.DEFINE_integer("slots", 4096, "tokens of prompt and answer", 2, _MOST)
    flags.DEFINE_enum("quantize", None, KINDS, "quantise weights for prefill and decode (off)")
    flags.DEFINE_float("temperature", 0.0, "temperature of decode (0: greedy)", lower_bound=0.0)
    flags.DEFINE_integer("top_k", 0, "top-k of decode (0: all tokens)", lower_bound=-1)
    flags.DEFINE_float("top_p", 1.0, "top-p of decode (1: all tokens)")
    flags.DEFINE_boolean("json", False, "print one line of JSON per program")
    flags.DEFINE_float("effort", 0.0, "effort of the compiler, -1 to 1", -1.0, 1.0)


def run(argv: Sequence[str]) -> int:
    """Plans the programs of the command line and prints the results; returns the exit code."""
    config = read_run_config(read_flags(argv))
    if not FLAGS.topology:
        raise UserError("no TPU slice; give one, for example --topology=v5p:4x4x4")
    unknown = [what for what in FLAGS.what if what not in WHAT]
    if unknown or not FLAGS.what:
        raise UserError(f"--what takes {', '.join(WHAT)}, got {','.join(unknown) or 'nothing'}")
    jax.config.update(EFFORT, FLAGS.effort)
    slots = max(FLAGS.slots, FLAGS.prompt + 1)
    sampling = SamplingParams.create(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    request = GenerationSizes(FLAGS.rows, FLAGS.prompt, slots, FLAGS.quantize, sampling)
    for what in FLAGS.what:
        try:
            with ops.use(**ops.parse(config.compute.ops)):
                found = plan(config, FLAGS.topology, what, request)
        except UserError as error:
            raise UserError(f"{what} of {config.name} on {FLAGS.topology}: {error}") from error
        print(json.dumps(found) if FLAGS.json else describe(found), flush=True)
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point of the command line; returns the exit code."""
    return run_cli(lambda: run(argv))
