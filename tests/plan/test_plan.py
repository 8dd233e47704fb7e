"""Planning: table of chips, times of collectives, costs of kernels, and small compilations."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from vl2jax.common.chips import TPUS
from vl2jax.common.errors import UserError
from vl2jax.inference.sampling import SEARCH, SamplingParams, next_token
from vl2jax.plan.hlo import Collective
from vl2jax.plan.hlo_text import Array
from vl2jax.plan.kernel_costs import kernel_cost
from vl2jax.plan.programs import tpu_devices
from vl2jax.plan.torus import collective_seconds, find_chip

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install "vl2jax[tpu]"'
)


def test_chips():
    assert find_chip("v5p:4x4x4").hbm == 95 * 2**30


@pytest.mark.parametrize("topology", ["v5p", "v5p-64", "v5p:4x", "h100:8", ":2x2"])
def test_topologies_that_are_none(topology):
    with pytest.raises(UserError, match="--topology"):
        find_chip(topology)


def _on_square(side: int):
    return [(x, y, 0) for x in range(side) for y in range(side)]


def test_rings_and_lines():
    """A ring of 16 sends in both directions, a line of 4 in one; two axes double the links."""
    chip, size = TPUS["v5e"], 1e9
    gather = Collective("all-gather", size, tuple(range(16)), 1, "")
    ring = collective_seconds(chip, _on_square(16), gather)
    assert ring == pytest.approx(size * 15 / 16 / (2 * chip.link))
    line = Collective("all-gather", size, (0, 1, 2, 3), 1, "")
    assert collective_seconds(chip, _on_square(4), line) == pytest.approx(size * 3 / 4 / chip.link)
    square = collective_seconds(chip, _on_square(4), gather)
    assert square == pytest.approx(size * 15 / 16 / (2 * chip.link))
    reduce = Collective("all-reduce", size, gather.group, 1, "")
    assert collective_seconds(chip, _on_square(4), reduce) == pytest.approx(2 * square)


def test_all_to_all_is_bound_by_the_middle():
    """On a ring of 16, half of the traffic crosses the middle, on two links per direction."""
    chip, size = TPUS["v5e"], 1e9
    exchange = Collective("all-to-all", size, tuple(range(16)), 1, "")
    seconds = collective_seconds(chip, _on_square(16), exchange)
    assert seconds == pytest.approx(16 * size / 4 / 2 / chip.link)


def test_one_device_waits_for_nobody():
    alone = Collective("all-reduce", 1e9, (3,), 1, "")
    assert collective_seconds(TPUS["v5p"], _on_square(2), alone) == 0


def test_cost_of_grouped_products_is_that_of_rows_there_are():
    """A buffer of 4096 rows, 1024 of them in use, and 8 experts."""
    rows, weights = Array("bf16", (4096, 256), True), Array("bf16", (8, 256, 512), True)
    out = Array("bf16", (4096, 512), True)
    flops, traffic = kernel_cost(1024.0, 8)("gmm.1", [rows, weights], (out,))
    useful = 2 * 1024 * 256 * 512
    assert useful < flops < 5 * useful
    assert traffic == pytest.approx(1024 * 256 * 2 + 8 * 256 * 512 * 2 + 1024 * 512 * 2)


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 1024])
def test_int8_experts_read_half_of_bfloat16(rows):
    """Small's experts, all on a device or an eighth of them."""
    for groups, pairs in ((64, 6.0 * rows), (8, 6.0 * rows / 8)):
        x, out = Array("bf16", (16 * 64, 2048), True), Array("bf16", (16 * 64, 1408), True)
        wide, narrow = (Array(dtype, (groups, 2048, 1408), True) for dtype in ("bf16", "s8"))
        scale = Array("f32", (groups, 1, 1408), True)
        cost = kernel_cost(pairs, groups)
        _, plain = cost("gmm.1", [x, wide], (out,))
        flops, int8 = cost("int8_experts.1", [x, narrow, scale], (out,))
        weights = min(groups, max(pairs, 1)) * 2048 * 1408
        assert weights < int8 < 0.75 * plain
        assert flops >= 2 * min(pairs, 1024) * 2048 * 1408


def test_cost_of_splash_is_half_where_causal():
    q, v = Array("bf16", (2, 4, 4096, 192), True), Array("bf16", (2, 4, 4096, 128), True)
    numbers = Array("s32", (4096, 128), True)
    whole, _ = kernel_cost(1.0, 1)("splash_mha_fwd.1", [q, q, v], (v,))
    causal, _ = kernel_cost(1.0, 1)("splash_mha_fwd.1", [q, q, v, numbers], (v,))
    assert whole == 2 * 2 * 4 * 4096**2 * (192 + 128)
    assert causal / whole == pytest.approx(9 / 16)
    q, v = (Array("bf16", a.shape[1:], True) for a in (q, v))  # a single row has no batch axis
    blocks = Array("s8", (1, 8, 8), True)
    single, _ = kernel_cost(1.0, 1)("splash_mha_fwd.1", [blocks, q, q, v], (v,))
    assert single == whole / 2


def _plan(*flags: str, **more_env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vl2jax.plan", *flags]
    env = os.environ | more_env
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "vl2jax\[tpu\]"'):
        tpu_devices("v5e:2x4")


def test_a_slice_is_asked_for():
    found = _plan("--config=configs/tiny.py")
    assert found.returncode == 1
    assert found.stderr == "error: no TPU slice; give one, for example --topology=v5p:4x4x4\n"


@needs_libtpu
def test_small_run_compiles_for_tpu_with_its_kernels():
    """Train, prefill and decode compile for TPU; all their loops and kernels are counted.

    The two rows of prefill and decode do not divide the mesh.  Even so, XLA gathers no array only
    to change its sharding.
    """
    small = (
        *("--config=tests/smallest.py", "--config.compute.moe_implementation=auto"),
        "--config.compute.dtype=bfloat16",
        *("--config.batch.rows=8", "--config.mesh.data=1"),
        *("--config.mesh.expert=2", "--config.mesh.fsdp=2"),
        *("--topology=v5e:2x2", "--effort=-1", "--json", "--what=train,prefill,decode"),
        *("--rows=2", "--prompt=128", "--slots=256", "--temperature=1", "--top_p=0.9"),
    )
    # libtpu logs what XLA warns of only if it is asked to.
    found = _plan(*small, TPU_MIN_LOG_LEVEL="0", TPU_STDERR_LOG_LEVEL="0")
    assert found.returncode == 0, found.stderr
    assert "nvoluntary full rematerialization" not in found.stderr
    train, prefill, decode = map(json.loads, found.stdout.splitlines())
    for program in (train, prefill, decode):
        assert program["mesh"] == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
        assert not program["unknown_kernels"]
        assert 0 < program["bytes"]["peak"] < program["hbm"]
        assert program["roofline"]["step"] > 0
    assert not train["open_loops"] and not prefill["open_loops"]
    # Whether a row keeps more tokens than the candidates is known when it runs.
    assert [SEARCH in origin for origin in decode["open_loops"]] == [True]
    assert decode["sampling"] == "top-k and top-p" and "sampling" not in prefill
    exchange = [name for name in train["collectives"] if name.endswith(" over expert")]
    assert any(name.startswith("all-gather") for name in exchange)
    assert any("fsdp" in name for name in train["collectives"])
    assert train["flops"] > train["model_flops"]


@pytest.fixture
def _uncached():
    """Stores no compiled program: those for devices that are not present cannot be read again."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@needs_libtpu
@pytest.mark.usefixtures("_uncached")
@pytest.mark.parametrize(
    ("options", "selections"),
    [({}, 0), ({"top_k": 50}, 1), ({"top_p": 0.9}, 1), ({"top_k": 50, "top_p": 0.9}, 1)],
)
def test_sampling_on_tpu_sorts_nothing(options, selections):
    """Of a vocabulary of 102,400, top-k and top-p need one partial selection, and no sort."""
    place = functools.partial(
        jax.ShapeDtypeStruct,
        (8, 102_400),
        sharding=jax.sharding.SingleDeviceSharding(tpu_devices("v5e:1x1")[0]),
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    arguments = SamplingParams.create(1.0, **options), place(jnp.float32), place(jnp.bool_), keys
    program = jax.jit(next_token).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    text = program.as_text()
    assert " sort(" not in text
    assert text.count('custom_call_target="TopK"') == selections


@needs_libtpu
def test_what_does_not_fit_is_one_line():
    found = _plan(
        *("--config=configs/vl2_base.py:sft", "--topology=v5e:1x1", "--what=decode"),
        *("--effort=-1", "--rows=4", "--slots=2048"),
    )
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("error: decode of vl2_base-sft on v5e:1x1: does not fit (parameters ")
    assert "15.75G" in last
