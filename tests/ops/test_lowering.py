"""Programs lower for CUDA and TPU on a machine with neither, with products as precise as promised.

By default, a TPU rounds the operands of a float32 product to bfloat16, and a GPU to TF32.  The
CPU, on which all other tests run, does neither.
"""

import functools
import re

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

ROWS, SLOTS, EXPERTS = 2, 128, 12  # no other size is 12
PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

both_platforms = pytest.mark.parametrize("platform", PLATFORMS)


@pytest.fixture(autouse=True)
def _default_precision():
    """Undoes the setting of `conftest.py`: users have JAX's default precision."""
    with jax.default_matmul_precision(None):
        yield


def _lowered(platform: str, step, *arguments) -> str:
    with compiling_for(platform):
        return step.trace(*arguments).lower(lowering_platforms=(PLATFORMS[platform],)).as_text()


def _config(dtype: str, **optim: str):
    """`smallest.py`, with rows and tiles long enough for the TPU kernels."""
    config = smallest.get_config()
    config.model.language_config.n_routed_experts = EXPERTS
    config.model.vision_config.patch_size = 4
    config.batch.length = SLOTS
    config.compute.dtype, config.compute.moe_implementation = dtype, "auto"
    config.optim.update(optim)
    return read_run_config(config.to_dict())


@functools.cache
def _train_step(platform: str, dtype: str) -> str:
    config = _config(dtype, algorithm="muon")
    architecture = choose_architecture(config)
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, jax.devices()[:1])
    recipe = make_recipe(config, architecture, mesh)
    state = jax.eval_shape(functools.partial(init_state, recipe), jax.random.key(0))
    batch, side = config.batch, architecture.vision.image_size
    shape = functools.partial(jax.ShapeDtypeStruct, (1, batch.rows, batch.length))
    tiles = jax.ShapeDtypeStruct((1, batch.tiles, side, side, 3), jnp.uint8)
    data = Batch(tiles, *(shape(jnp.int32) for _ in range(4)), shape(jnp.bool_))
    return _lowered(platform, jax.jit(functools.partial(train_step, recipe)), state, data)


@functools.cache
def _prefill_and_burst(platform: str, dtype: str) -> tuple[str, str]:
    architecture, dtype = choose_architecture(_config(dtype)), jnp.dtype(DTYPES[dtype])
    steps = compiled_steps(architecture, dtype, platform)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(architecture)
    )
    shape = jax.ShapeDtypeStruct
    with compiling_for(platform):
        caches = jax.eval_shape(lambda: init_caches(architecture.decoder, ROWS, SLOTS, dtype))
    x = shape((ROWS, SLOTS, architecture.decoder.hidden_size), dtype)
    positions = shape((ROWS, SLOTS), jnp.int32)
    prefill = _lowered(platform, steps.prefill, params, x, positions, caches)
    state = DecodeState(
        caches=caches,
        tokens=shape((ROWS,), jnp.int32),
        positions=shape((ROWS,), jnp.int32),
        seen=shape((ROWS, architecture.decoder.vocab_size), jnp.bool_),
        done=shape((ROWS,), jnp.bool_),
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS)),
    )
    sampling, eos = SamplingParams.create(), shape((1,), jnp.int32)
    counts = jnp.int32(MAX_BURST), jnp.int32(0)
    burst = _lowered(platform, steps.burst, params, sampling, state, eos, *counts)
    return prefill, burst


def _programs(platform: str, dtype: str) -> tuple[str, ...]:
    return _train_step(platform, dtype), *_prefill_and_burst(platform, dtype)


def test_train_step_lowers_for_cuda():
    text = _train_step("gpu", "float32")
    _all_plain(text)
    assert text.count("stablehlo.while") >= 4  # layers forward and backward, experts, loss


def test_prefill_and_decode_lower_for_cuda():
    prefill, burst = _prefill_and_burst("gpu", "bfloat16")
    _all_plain(prefill)
    _all_plain(burst)
    assert f"tensor<{ROWS}x{MAX_BURST}xi32>" in burst


def _all_plain(text: str) -> None:
    """Asserts that the only custom calls are ones that XLA has for every platform."""
    called = {
        line.split("@", 1)[1].split("(")[0] for line in text.split("\n") if "custom_call @" in line
    }
    assert called <= {"Sharding", "mhlo.topk", "ApproxTopK", "cu_threefry2x32_ffi"}, called


def _products(text: str) -> list[tuple[str, list[str]]]:
    """All matrix products: the line, and the types of the operands."""
    lines = [line for line in text.split("\n") if re.search(r"\b(dot_general|convolution)\b", line)]
    return [(line, re.search(r" : \(([^)]*)\)", line)[1].split(", ")) for line in lines]


@both_platforms
def test_float32_programs_have_the_highest_precision(platform):
    """All products of forward and backward pass, optimizer and decoding; and no kernels."""
    for text in _programs(platform, "float32"):
        found = _products(text)
        assert len(found) > 10
        for line, operands in found:
            assert all("xf32" in operand for operand in operands), line
            assert "precision = [HIGHEST, HIGHEST]" in line, line
        assert "@tpu_custom_call" not in text


def test_bfloat16_programs_have_kernels():
    """So float32 programs have none because of their dtype."""
    train, prefill, _ = _programs("tpu", "bfloat16")
    assert train.count("@tpu_custom_call") > 4  # attention and experts, forward and backward
    assert prefill.count("@tpu_custom_call") >= 2


@both_platforms
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_router_is_float32(platform, dtype):
    """Its products are the only ones with as many columns as there are experts."""
    for text in _programs(platform, dtype):
        routers = [
            (line, operands)
            for line, operands in _products(text)
            if re.search(rf"x{EXPERTS}x", operands[1])
        ]
        assert routers
        for line, operands in routers:
            assert all("xf32" in operand for operand in operands), line
            assert "precision = [HIGHEST, HIGHEST]" in line, line
