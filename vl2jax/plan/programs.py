"""Compiles the programs of training and generation for TPUs that need not be present."""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vl2jax.common.errors import UserError
from vl2jax.config import VL2Config
from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.steps import DecodeState, compiled_steps
from vl2jax.model.decoder import init_caches
from vl2jax.model.quantization import int8_shapes
from vl2jax.model.vl2 import DTYPES, abstract_params
from vl2jax.ops.platform import compiling_for
from vl2jax.parallel.mesh import BATCH_AXES, batch_shards
from vl2jax.parallel.sharding import CACHE_RULES, batch_sharding, param_shardings
from vl2jax.plan.torus import find_chip
from vl2jax.processing.batch import Batch
from vl2jax.training.run_config import RunConfig
from vl2jax.training.setup import jit_train_step, make_recipe, state_shapes


@dataclasses.dataclass(frozen=True)
class GenerationSizes:
    """Sizes of a prefill or decode program.

    Attributes:
      rows: number of prompts in the batch.
      prompt: tokens per prompt.
      slots: cache slots per row, for prompt and answer.
      quantize: see `vl2jax.load`.
      sampling: how tokens are chosen; the decode program depends on whether it is greedy, and on
        whether it has top-k or top-p.
    """

    rows: int
    prompt: int
    slots: int
    quantize: str | None = None
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams.create)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled program.

    Attributes:
      text: the compiled HLO.
      kept: bytes per device of its arguments, by kind.
      temporaries: peak bytes per device besides the arguments.
      peak: peak bytes per device.
      seconds: compilation time.
      xla_flops: FLOPs that XLA counts, with each loop counted once.
    """

    text: str
    kept: dict[str, int]
    temporaries: int
    peak: int
    seconds: float
    xla_flops: float


def tpu_devices(topology: str) -> list[jax.Device]:
    """Describes the devices of a TPU slice, which need not be present.

    Args:
      topology: such as `v5p:4x4x4`.

    Raises:
      UserError: libtpu is not installed, or the slice does not exist.
    """
    find_chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('compiling for TPU needs libtpu: pip install "vl2jax[tpu]"')
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is locked
    single = re.fullmatch(r"\w+:(1x)*1", topology) is not None
    options = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        what = str(error).splitlines()[0].partition(": ")[2]
        raise UserError(f"--topology {topology!r}: {what}") from error


def build_train(config: RunConfig, architecture: VL2Config, mesh: Mesh) -> CompiledProgram:
    """Compiles the train step of `train.py`."""
    recipe = make_recipe(config, architecture, mesh)
    state, split, batch = state_shapes(recipe, mesh), batch_sharding(mesh), config.batch
    parts, side = batch.microbatches, architecture.vision.image_size

    def shape(dtype, *axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((parts, *axes), dtype, sharding=split)

    integers = shape(jnp.int32, batch.rows // parts, batch.length)
    data = Batch(
        tiles=shape(jnp.uint8, batch.tiles // parts, side, side, 3),
        tokens=integers,
        image_index=integers,
        positions=integers,
        segment_ids=integers,
        loss_mask=shape(jnp.bool_, batch.rows // parts, batch.length),
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jit_train_step(recipe, mesh, shardings)
    kept = {"parameters": (state.params, state.router), "optimizer": state.opt_state}
    return _compile(mesh, step, (state, data), kept)


def build_prefill(
    config: RunConfig, architecture: VL2Config, mesh: Mesh, request: GenerationSizes
) -> CompiledProgram:
    """Compiles the prefill of whole prompts, as `sample.py` runs it."""
    dtype, params = _params(config, architecture, mesh, request.quantize)
    place = functools.partial(_placed, mesh)
    x = place((request.rows, request.prompt, architecture.decoder.hidden_size), dtype)
    positions = place((request.rows, request.prompt), jnp.int32)
    caches = _caches(mesh, architecture, request.rows, request.prompt, dtype)
    step = compiled_steps(architecture, dtype, "tpu").prefill
    return _compile(
        mesh, step, (params, x, positions, caches), {"parameters": params, "cache": caches}
    )


def build_decode(
    config: RunConfig, architecture: VL2Config, mesh: Mesh, request: GenerationSizes
) -> CompiledProgram:
    """Compiles the burst, the loop that decodes several tokens per row, as `sample.py` runs it."""
    dtype, params = _params(config, architecture, mesh, request.quantize)
    rows = request.rows

    def place(shape: tuple[int, ...], dtype: Any) -> Any:  # a `ShapeDtypeStruct` replaces an array
        return _placed(mesh, shape, dtype)

    caches = _caches(mesh, architecture, rows, request.slots, dtype)
    state = DecodeState(
        caches=caches,
        tokens=place((rows,), jnp.int32),
        positions=place((rows,), jnp.int32),
        seen=place((rows, architecture.decoder.vocab_size), jnp.bool_),
        done=place((rows,), jnp.bool_),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
    )
    eos = place((1,), jnp.int32)
    arguments = (params, request.sampling, state, eos, jnp.int32(1), jnp.int32(0))
    step = compiled_steps(architecture, dtype, "tpu").burst
    return _compile(mesh, step, arguments, {"parameters": params, "cache": caches})


def _params(config: RunConfig, architecture: VL2Config, mesh: Mesh, quantize: str | None):
    """The dtype of generation and its variables: in this dtype or int8, router bias in float32."""
    dtype = jnp.dtype(DTYPES[config.compute.dtype])
    shapes = abstract_params(architecture)
    shardings = param_shardings(mesh, shapes)

    def cast(shape, sharding, dtype):
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)

    variables = {
        name: jax.tree.map(
            functools.partial(cast, dtype=dtype if name == "params" else jnp.float32),
            shapes[name],
            shardings[name],
        )
        for name in shapes
    }
    return dtype, int8_shapes(variables) if quantize == "int8" else variables


def _placed(mesh: Mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A shape whose rows are sharded over the batch axes of the mesh, if these divide them."""
    rows = BATCH_AXES if shape[0] % batch_shards(mesh) == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(rows))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _caches(mesh: Mesh, architecture: VL2Config, rows: int, slots: int, dtype):
    """Shapes of the caches, with the shardings of `init_caches`."""
    with compiling_for("tpu"):
        shapes = jax.eval_shape(lambda: init_caches(architecture.decoder, rows, slots, dtype))
    divides = rows % batch_shards(mesh) == 0

    def place(path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = CACHE_RULES[path[-1].name]
        spec = [None if axes == BATCH_AXES and not divides else axes for axes in spec]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _compile(mesh: Mesh, step, arguments: tuple, kept: dict[str, Any]) -> CompiledProgram:
    """Traces, lowers and compiles a program.

    Args:
      mesh: mesh of TPU devices.
      step: jitted function.
      arguments: its arguments, as shapes with shardings.
      kept: arguments whose sizes are reported, by kind.

    Raises:
      UserError: the program needs more memory than the chip has.
    """
    nbytes = {name: _device_bytes(tree) for name, tree in kept.items()}
    with compiling_for("tpu"), jax.set_mesh(mesh):
        lowered = step.trace(*arguments).lower(lowering_platforms=("tpu",))
        started = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            told = str(error).partition("RESOURCE_EXHAUSTED: ")[2].split("\n")[0].split(". ")[0]
            sizes = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in nbytes.items())
            raise UserError(f"does not fit ({sizes} on each chip): {told}") from error
        seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    given = memory.argument_size_in_bytes
    temporaries = max(memory.peak_memory_in_bytes - given, 0)
    # Parameters that the program does not use are also in memory, such as the vision tower.
    peak = temporaries + max(given, sum(nbytes.values()))
    counted: Any = compiled.cost_analysis()
    return CompiledProgram(
        compiled.as_text(), nbytes, temporaries, peak, seconds, counted.get("flops", 0.0)
    )


def _device_bytes(tree) -> int:
    """Bytes of all shards of one device."""
    leaves = jax.tree.leaves(tree)
    parts = (np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return int(sum(parts))
