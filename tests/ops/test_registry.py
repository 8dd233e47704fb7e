"""The registry chooses implementations by platform, arguments and request, and reports them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mesh_case
import pytest

import vl2jax
from vl2jax import ops
from vl2jax.common.errors import UserError
from vl2jax.ops import registry
from vl2jax.ops.platform import platform, platform_of
from vl2jax.ops.registry import Implementation, Operation
from vl2jax.parallel.sharding import make_mesh
from vl2jax.training.setup import jit_train_step, state_shapes


@pytest.fixture
def halve(monkeypatch):
    """An operation with three implementations: for TPU, for even numbers, and for all numbers."""
    monkeypatch.setattr(registry, "_operations", dict(registry._operations))

    def odd(x) -> str:
        return "odd" if x % 2 else ""

    return Operation(
        "halve",
        Implementation("tpu", lambda x: ("tpu", x / 2), ("tpu",)),
        Implementation("even", lambda x: ("even", x // 2), unsupported=odd),
        Implementation("any", lambda x: ("any", x / 2)),
    )


def test_first_supported_is_chosen(halve):
    assert halve(4) == ("even", 2)
    assert halve(3) == ("any", 1.5)
    with ops.compiling_for("tpu"):
        assert halve(4) == ("tpu", 2)


def test_request_comes_first(halve, monkeypatch):
    with ops.use(halve="any"):
        assert halve(4) == ("any", 2)
        with ops.use(halve="even"):
            assert halve(4)[0] == "even"
            assert halve(3)[0] == "any"  # not supported, so the others are tried
    monkeypatch.setenv(registry.ENVIRONMENT, " halve=any, attention=xla")
    assert halve(4)[0] == "any"
    with ops.use(halve="even"):
        assert halve(4)[0] == "even"


def test_jit_traces_anew_for_another_implementation():
    """Requested implementations are part of jit's cache key."""
    operation = Operation(
        "test_only", Implementation("one", lambda x: x + 1), Implementation("two", lambda x: x + 2)
    )
    try:
        f = jax.jit(operation)
        assert f(1.0) == 2.0
        with ops.use(test_only="two"):
            assert f(1.0) == 3.0
        assert f(1.0) == 2.0
    finally:
        del registry._operations["test_only"]


def test_request_overrides_preference(halve):
    assert halve(4, prefer="any")[0] == "any"
    assert halve(3, prefer="even")[0] == "any"  # not supported
    with ops.use(halve="even"):
        assert halve(4, prefer="any")[0] == "even"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atention=xla", "no operation 'atention'"),
        ("attention=cuda", "attention has no implementation 'cuda'; choose one of tpu, cpu, xla"),
        ("attention", "no implementation ''"),
    ],
)
def test_unknown_names_are_one_line(text, message):
    with pytest.raises(UserError, match=message):
        ops.parse(text)


def test_choices_are_reported_once(halve):
    told = []
    ops.report_choices(told.append)
    try:
        halve(3)
        halve(3)
    finally:
        ops.report_choices(None)
    halve(5)
    assert told == ["halve of 3: any (not tpu: runs on tpu only; even: odd)"]


def test_every_operation_describes_itself(halve):
    found = {name: (chosen, remark) for name, chosen, remark in ops.describe_choices()}
    assert found["halve"] == ("even", "else any; tpu on tpu only")
    assert {"attention", "latent_attention", "experts", "cache_write", "matmul"} <= set(found)


def test_every_operation_serves_every_platform():
    for operation in registry._operations.values():
        unconditional = [
            one
            for one in operation.implementations.values()
            if not one.platforms and one.unsupported is registry._serves_all
        ]
        assert unconditional, operation.name


@pytest.fixture
def tpu_by_default(monkeypatch):
    """A machine whose default backend is a TPU, while all arrays of a test are on its CPU."""
    monkeypatch.setattr(
        vl2jax.ops.platform, "default_device", lambda: SimpleNamespace(platform="tpu")
    )
    jax.clear_caches()


def test_the_platform_is_where_arrays_lie(tpu_by_default):
    assert platform() == "tpu" and platform_of({"a": jnp.ones(2)}) == "cpu"
    assert platform_of(jax.ShapeDtypeStruct((2,), jnp.float32)) == "tpu"
    with ops.compiling_for("gpu"):
        assert platform_of(jnp.ones(2)) == "gpu"


def test_the_platform_is_that_of_the_mesh():
    kind = (jax.sharding.AxisType.Auto,)
    for name, family in (("gpu", "gpu"), ("cuda", "gpu"), ("tpu", "tpu")):
        device = jax.sharding.AbstractDevice("a chip", None, name)
        mesh = jax.sharding.AbstractMesh((2,), ("data",), kind, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert platform() == family
    with jax.default_device("cpu"):
        assert platform() == "cpu"


def test_programs_are_traced_for_the_parameters_platform(tpu_by_default, quick_compilation):
    """No implementation for TPU is chosen in a forward pass, an answer and a train step."""
    config = mesh_case.architecture("mla")
    recipe = mesh_case.recipe(config)
    state, batch = mesh_case.start(recipe), mesh_case.batches(1)[0]
    params = jax.device_put({"params": state.params, "router": state.router}, jax.devices()[0])
    lines: list[str] = []
    ops.report_choices(lines.append)
    try:
        vl2jax.forward(config, params, mesh_case.prompts(1))
        vl2jax.generate(config, params, mesh_case.prompts(1), max_new_tokens=2, eos_token_id=())
        mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}, jax.devices()[:1])
        with jax.set_mesh(mesh):
            shapes = state_shapes(recipe, mesh)
            shardings = jax.tree.map(lambda x: x.sharding, shapes)
            jit_train_step(recipe, mesh, shardings).trace(shapes, batch)
    finally:
        ops.report_choices(None)
    assert {line.split()[0] for line in lines} >= {"attention", "experts", "matmul", "cache_write"}
    assert all("runs on tpu only" in line for line in lines if line.startswith("attention"))
