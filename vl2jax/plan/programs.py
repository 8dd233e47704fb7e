"""The programs of training and generation, compiled for TPUs that are not there."""

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
class Request:
    """What a prefill or decoding program is for.

    Attributes:
      rows: prompts at a time.
      prompt: tokens of each.
      slots: of the cache, prompt and answer.
      quantize: the weights, see `vl2jax.load`.
    """

    rows: int
    prompt: int
    slots: int
    quantize: str | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program.

    Attributes:
      text: what the compiler made.
      kept: bytes per device of what it is given, by kind.
      temporaries: bytes per device at the fullest moment, beyond what it is given.
      peak: bytes per device at the fullest moment.
      seconds: that compilation took.
    """

    text: str
    kept: dict[str, int]
    temporaries: int
    peak: int
    seconds: float


def tpu_devices(topology: str) -> list[jax.Device]:
    """Devices of a slice that need not be there.

    Raises:
      UserError: no libtpu, or not such a slice.
    """
    find_chip(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError('compiling for TPU needs libtpu: pip install "vl2jax[tpu]"')
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask,
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and none to share
    single = re.fullmatch(r"\w+:(1x)*1", topology) is not None
    options = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        what = str(error).splitlines()[0].partition(": ")[2]
        raise UserError(f"--topology {topology!r}: {what}") from error


def build_train(config: RunConfig, architecture: VL2Config, mesh: Mesh) -> Built:
    """The step that `train.py` runs."""
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
    config: RunConfig, architecture: VL2Config, mesh: Mesh, request: Request
) -> Built:
    """The decoder over whole prompts, as `sample.py` runs it."""
    dtype, params = _params(config, architecture, mesh, request.quantize)
    place = functools.partial(_placed, mesh)
    x = place((request.rows, request.prompt, architecture.decoder.hidden_size), dtype)
    positions = place((request.rows, request.prompt), jnp.int32)
    caches = _caches(mesh, architecture, request.rows, request.prompt, dtype)
    step = compiled_steps(architecture, dtype, "tpu").prefill
    return _compile(
        mesh, step, (params, x, positions, caches), {"parameters": params, "cache": caches}
    )


def build_decode(config: RunConfig, architecture: VL2Config, mesh: Mesh, request: Request) -> Built:
    """The loop that adds a token to every row, as `sample.py` runs it."""
    dtype, params = _params(config, architecture, mesh, request.quantize)
    rows = request.rows

    def place(shape: tuple[int, ...], dtype: Any) -> Any:  # in place of an array
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
    arguments = (params, SamplingParams.create(), state, eos, jnp.int32(1), jnp.int32(0))
    step = compiled_steps(architecture, dtype, "tpu").burst
    return _compile(mesh, step, arguments, {"parameters": params, "cache": caches})


def _params(config: RunConfig, architecture: VL2Config, mesh: Mesh, quantize: str | None):
    """Variables for generation: weights in the compute dtype or int8, the router's bias in
    float32."""
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
    """Rows over the axes that batches are split over, where they divide."""
    rows = BATCH_AXES if shape[0] % batch_shards(mesh) == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(rows))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _caches(mesh: Mesh, architecture: VL2Config, rows: int, slots: int, dtype):
    """Caches, split as `init_caches` splits them."""
    with compiling_for("tpu"):
        shapes = jax.eval_shape(lambda: init_caches(architecture.decoder, rows, slots, dtype))
    divides = rows % batch_shards(mesh) == 0

    def place(path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = CACHE_RULES[path[-1].name]
        spec = [None if axes == BATCH_AXES and not divides else axes for axes in spec]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def _compile(mesh: Mesh, step, arguments: tuple, kept: dict[str, Any]) -> Built:
    """Traces, lowers and compiles.

    Raises:
      UserError: it needs more memory than the chip has.
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
    # What the program does not use lies there all the same: the vision tower while decoding.
    peak = temporaries + max(given, sum(nbytes.values()))
    return Built(compiled.as_text(), nbytes, temporaries, peak, seconds)


def _device_bytes(tree) -> int:
    """Bytes of one device's part of all leaves."""
    leaves = jax.tree.leaves(tree)
    parts = (np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return int(sum(parts))
