"""Does it fit, and what will limit it: compiles a run for TPUs that are not there.

    python -m vl2jax.plan --config=configs/vl2_base.py:sft --topology=v5p:4x4x4 \\
        --config.mesh.expert=8 --what=train,decode --json

Compiled are the programs that `train.py` and `sample.py` run. Needs libtpu: pip install
"vl2jax[tpu]".
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
from vl2jax.inference.steps import MAX_BURST
from vl2jax.model.quantization import KINDS
from vl2jax.ops.experts.tpu_chunked import CHUNKS, SCOPE
from vl2jax.ops.experts.xla import ACTIVE, BLOCKS
from vl2jax.parallel.mesh import batch_shards
from vl2jax.parallel.sharding import make_mesh
from vl2jax.plan.hlo import Cost, analyse
from vl2jax.plan.kernel_costs import kernel_cost
from vl2jax.plan.programs import (
    Built,
    Request,
    build_decode,
    build_prefill,
    build_train,
    tpu_devices,
)
from vl2jax.plan.torus import collective_seconds, find_chip
from vl2jax.training.report import model_flops
from vl2jax.training.run_config import RunConfig, read_run_config
from vl2jax.training.setup import choose_architecture

WHAT = ("train", "prefill", "decode")
# How hard the compiler tries: -1 takes half as long and gives nearly the same program.
EFFORT = "jax_exec_time_optimization_effort"


def plan(
    config: RunConfig,
    topology: str,
    what: str,
    request: Request,
) -> dict:
    """Compiles one program and counts.

    Args:
      config: of the run; of `prefill` and `decode` only model, dtype and mesh matter.
      topology: like `v5p:4x4x4`.
      what: of `WHAT`.
      request: of `prefill` and `decode`.

    Returns:
      Sizes in bytes, times in seconds, all per device; see `describe`.

    Raises:
      UserError: it does not fit, or the mesh does not.
    """
    chip, devices = find_chip(topology), tpu_devices(topology)
    mesh = make_mesh(dataclasses.asdict(config.mesh), devices)
    architecture = choose_architecture(config)
    if what == "train":
        built = build_train(config, architecture, mesh)
    else:
        build = {"prefill": build_prefill, "decode": build_decode}[what]
        built = build(config, architecture, mesh, request)
    tokens, flops = work(config, architecture, what, request)
    # A step has several microbatches, a burst several tokens of a row: what is on the way at once.
    parts = {"train": config.batch.microbatches, "decode": MAX_BURST}.get(what, 1)
    decoder = architecture.decoder
    chosen, routed = decoder.num_experts_per_tok or 0, decoder.n_routed_experts or 0
    experts = -(-min(request.rows * chosen, routed) // mesh.shape["expert"])
    cost = analyse(
        built.text,
        open_trips=lambda origin: _open_trips(config, what, origin, experts, batch_shards(mesh)),
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
        "devices": len(devices),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        **_report(rates, mesh, built, cost, flops / len(devices)),
        "tokens": tokens,
    }


def work(config: RunConfig, architecture: VL2Config, what: str, request: Request):
    """Tokens of the decoder in one run of a program, and the operations the model asks for.

    Six per activated parameter in training, two in a forward pass; see `report.model_flops`.
    """
    per_token, per_tile = model_flops(architecture)
    if what == "train":
        batch = config.batch
        tokens = batch.rows * batch.length
        return tokens, per_token * tokens + per_tile * batch.tiles
    tokens = request.rows * (request.prompt if what == "prefill" else MAX_BURST)
    head = 2.0 * architecture.decoder.hidden_size * architecture.decoder.vocab_size
    return tokens, tokens * (per_token / 3 - (head if what == "prefill" else 0))


def _open_trips(config: RunConfig, what: str, origin: str, experts: int, shards: int) -> int | None:
    """Loops whose length depends on the data: a burst of decoding counts as whole; the loss goes
    over blocks of a device's rows (one of `shards` parts) until none has a supervised token left,
    here over all; experts are balanced, and where they are worked off one by one (few rows of
    int8) all rows choose different ones."""
    if SCOPE in origin:
        return CHUNKS
    if ACTIVE in origin:
        return 1 if BLOCKS in origin else experts
    if what == "decode":
        return MAX_BURST
    if "jvp()" in origin:
        batch, chunk = config.batch, config.compute.loss_chunk
        rows = batch.rows // batch.microbatches // shards
        return -(-batch.length // min(max(chunk // rows, 1), batch.length))
    return None


def _report(chip: TPU, mesh: Mesh, built: Built, cost: Cost, model: float) -> dict:
    """Memory, work, collectives and the roofline of one device."""
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
    """The axes along which the devices of a group differ."""
    places = np.unravel_index(group, mesh.devices.shape)
    differ = [len(set(place.tolist())) > 1 for place in places]
    return "+".join(name for name, does in zip(mesh.axis_names, differ, strict=True) if does)


def describe(found: dict) -> str:
    """What `plan` found, for people."""
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
        "memory": f"{size['peak'] / gib:.2f} of {found['hbm'] / gib:.0f} GiB at most on a device"
        f" ({memory} GiB)",
        "work": f"{found['flops']:.3g} flops on a device, {ratio:.2f} times what the model asks for"
        f" ({found['model_flops']:.3g}); {found['traffic'] / 1e9:.3g} GB to and from memory",
        "sent": moved or "nothing",
        "step": f"at least {bound['step']:.3g} s, bound by {bound['binding']} ({times} s);"
        f" {found['tokens'] / bound['step']:,.0f} tokens/s, MFU at most"
        f" {100 * found['mfu_bound']:.0f}%",
        "compiled": f"in {found['compile_seconds']} s",
    }
    for name, text in (("open_loops", "loops counted once"), ("unknown_kernels", "not counted")):
        if found[name]:
            lines[text] = ", ".join(found[name])
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def define_plan_flags() -> None:
    """Defines the flags of `train.py`, and those of this program."""
    define_flags()
    flags.DEFINE_string("topology", None, "the slice, like v5p:4x4x4 or v5e:2x4")
    flags.DEFINE_list("what", ["train"], f"programs: {', '.join(WHAT)}")
    flags.DEFINE_integer("rows", 8, "prompts at a time, of prefill and decode", lower_bound=1)
    flags.DEFINE_integer("prompt", 2048, "tokens of a prompt", lower_bound=1)
    flags.DEFINE_integer("slots", 4096, "tokens of prompt and answer", lower_bound=2)
    flags.DEFINE_enum("quantize", None, KINDS, "weights of prefill and decode (as they are)")
    flags.DEFINE_boolean("json", False, "one line of JSON per program")
    flags.DEFINE_float("effort", 0.0, "how hard the compiler tries, -1 to 1")


def run(argv: Sequence[str]) -> int:
    """Plans what the command line asks for; the exit code."""
    config = read_run_config(read_flags(argv))
    if not FLAGS.topology:
        raise UserError("give the slice to plan for: --topology=v5p:4x4x4")
    unknown = [what for what in FLAGS.what if what not in WHAT]
    if unknown or not FLAGS.what:
        raise UserError(f"--what takes {', '.join(WHAT)}, got {','.join(unknown) or 'nothing'}")
    jax.config.update(EFFORT, FLAGS.effort)
    slots = max(FLAGS.slots, FLAGS.prompt + 1)
    request = Request(FLAGS.rows, FLAGS.prompt, slots, FLAGS.quantize)
    for what in FLAGS.what:
        try:
            with ops.use(**ops.parse(config.compute.ops)):
                found = plan(config, FLAGS.topology, what, request)
        except UserError as error:
            raise UserError(f"{what} of {config.name} on {FLAGS.topology}: {error}") from error
        print(json.dumps(found) if FLAGS.json else describe(found), flush=True)
    return 0


def main(argv: Sequence[str]) -> int:
    """Command line entry; the exit code."""
    return run_cli(lambda: run(argv))
