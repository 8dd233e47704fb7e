"""Programs lower for CUDA on a machine without a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
import smallest

from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.steps import MAX_BURST, DecodeState, compiled_steps
from vl2jax.model.decoder import init_caches
from vl2jax.model.vl2 import abstract_params
from vl2jax.ops.platform import compiling_for
from vl2jax.parallel.sharding import make_mesh
from vl2jax.processing.batch import Batch
from vl2jax.training.run_config import read_run_config
from vl2jax.training.setup import choose_architecture, make_recipe
from vl2jax.training.train_step import init_state, train_step

ROWS, SLOTS = 2, 64


def _lowered(step, *arguments) -> str:
    with compiling_for("gpu"):
        return step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(scope="module")
def config():
    return read_run_config(smallest.get_config().to_dict())


@pytest.fixture(scope="module")
def architecture(config):
    return choose_architecture(config)


def test_train_step_lowers_for_cuda(config, architecture):
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, jax.devices()[:1])
    recipe = make_recipe(config, architecture, mesh)
    state = jax.eval_shape(functools.partial(init_state, recipe), jax.random.key(0))
    batch, side = config.batch, architecture.vision.image_size
    shape = functools.partial(jax.ShapeDtypeStruct, (1, batch.rows, batch.length))
    tiles = jax.ShapeDtypeStruct((1, batch.tiles, side, side, 3), jnp.uint8)
    data = Batch(tiles, *(shape(jnp.int32) for _ in range(4)), shape(jnp.bool_))
    text = _lowered(jax.jit(functools.partial(train_step, recipe)), state, data)
    _all_plain(text)
    assert text.count("stablehlo.while") >= 4  # layers forward and backward, experts, loss


def test_prefill_and_decode_lower_for_cuda(architecture):
    dtype = jnp.dtype(jnp.bfloat16)
    steps = compiled_steps(architecture, dtype, "gpu")
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(architecture)
    )
    shape = jax.ShapeDtypeStruct
    with compiling_for("gpu"):
        caches = jax.eval_shape(lambda: init_caches(architecture.decoder, ROWS, SLOTS, dtype))
    x = shape((ROWS, SLOTS, architecture.decoder.hidden_size), dtype)
    _all_plain(_lowered(steps.prefill, params, x, shape((ROWS, SLOTS), jnp.int32), caches))
    state = DecodeState(
        caches=caches,
        tokens=shape((ROWS,), jnp.int32),
        positions=shape((ROWS,), jnp.int32),
        seen=shape((ROWS, architecture.decoder.vocab_size), jnp.bool_),
        done=shape((ROWS,), jnp.bool_),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS)),
    )
    sampling, eos = SamplingParams.create(), shape((1,), jnp.int32)
    text = _lowered(steps.burst, params, sampling, state, eos, jnp.int32(MAX_BURST), jnp.int32(0))
    _all_plain(text)
    assert f"tensor<{ROWS}x{MAX_BURST}xi32>" in text


def _all_plain(text: str) -> None:
    """Asserts that the only custom calls are ones that XLA has for every platform."""
    called = {
        line.split("@", 1)[1].split("(")[0] for line in text.split("\n") if "custom_call @" in line
    }
    assert called <= {"Sharding", "mhlo.topk", "ApproxTopK", "cu_threefry2x32_ffi"}, called
