"""Costs of compiled programs, against programs whose costs are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.parallel.mesh import AXES
from vl2jax.parallel.sharding import make_mesh
from vl2jax.plan import hlo
from vl2jax.plan.hlo_text import group_of

LAYERS, ROWS, WIDTH = 7, 16, 32


def _scan(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


@pytest.fixture(scope="module")
def sharded():
    """Costs of the gradients of a scan, sharded over `data` (rows) and `tensor` (width)."""
    mesh = make_mesh({"data": 2, "fsdp": 1, "expert": 1, "tensor": 4})
    assert mesh.axis_names == AXES

    def shape(size, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(size, jnp.float32, sharding=sharding)

    w, x = (
        shape((LAYERS, WIDTH, WIDTH), None, None, "tensor"),
        shape((ROWS, WIDTH), "data", "tensor"),
    )
    step = jax.grad(lambda w, x: jnp.sum(_scan(w, x)))
    return hlo.analyse(jax.jit(step).lower(w, x).compile().as_text())


def test_loops_count_as_often_as_they_run():
    arguments = jnp.zeros((LAYERS, WIDTH, WIDTH)), jnp.zeros((ROWS, WIDTH))
    compiled = jax.jit(_scan).lower(*arguments).compile()
    found = hlo.analyse(compiled.as_text())
    once = 2 * ROWS * WIDTH * WIDTH
    assert found.flops == LAYERS * once
    assert compiled.cost_analysis()["flops"] < 2 * once  # XLA counts the loop once
    assert not found.collectives and not found.open_loops
    weights = LAYERS * WIDTH * WIDTH * 4
    assert weights < found.traffic < 8 * weights  # the CPU copies each layer's weights first


def test_sharded_work_is_that_of_one_device(sharded):
    """One product forward and two backward, sharded over 8 devices."""
    assert sharded.flops == pytest.approx(3 * LAYERS * 2 * ROWS * WIDTH * WIDTH / 8)


def test_collectives_have_kind_group_and_count(sharded):
    along = {"tensor": 4, "data": 2}
    gathers = [c for c in sharded.collectives if c.kind == "all-gather"]
    assert {len(c.group) for c in gathers} == {along["tensor"]}
    rows = ROWS // 2 * WIDTH * 4  # the rows of one device, with full width
    forward = [c for c in gathers if c.nbytes == rows]
    assert sum(c.count for c in forward) >= LAYERS
    assert forward[0].sent == pytest.approx(rows * 3 / 4)
    over_data = [
        c for c in sharded.collectives if len(c.group) == 2
    ]  # reductions of weight gradients
    assert sum(c.count * c.nbytes for c in over_data) >= LAYERS * WIDTH * WIDTH * 4 / 4


def test_loops_that_depend_on_data_are_named():
    def until(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)

    compiled = jax.jit(until).lower(jnp.zeros((8, 8)), jnp.int32(3)).compile()
    text = compiled.as_text()
    once = hlo.analyse(text)
    assert once.flops == 2 * 8**3
    assert [name.endswith("while") for name in once.open_loops] == [True]
    known = hlo.analyse(text, open_trips=lambda origin: 5)
    assert known.flops == 5 * once.flops and not known.open_loops


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, channel_id=1", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, channel_id=1", (0, 1, 2, 3)),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ],
)
def test_groups_in_every_notation(text, group):
    assert group_of(text) == group


def test_kernels_tell_their_cost_or_are_named():
    line = (
        "ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {\n"
        "  %a = bf16[4,8]{1,0} parameter(0)\n"
        "  ROOT %mine.1 = bf16[4,8]{1,0:T(8,128)S(1)} custom-call(%a),"
        ' custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        "\n}}, backend_config={ESTIMATE}\n}\n"
    )
    estimate = '"cost_estimate":{"flops":"12","transcendentals":"0","bytes_accessed":"34"}'
    told = hlo.analyse(line.replace("ESTIMATE", estimate))
    assert (told.flops, told.traffic, told.unknown_kernels) == (12, 34, ())
    silent = hlo.analyse(line)
    assert silent.unknown_kernels == ("mine.1",)
    assert silent.traffic == 64  # the result stays on the chip
    known = hlo.analyse(line, kernel_cost=lambda name, operands, results: (1.0, 2.0))
    assert (known.flops, known.traffic, known.unknown_kernels) == (1, 2, ())


def test_products_written_as_convolutions():
    """On TPU, a batched product is a convolution whose batch is a window over an operand."""

    def line(result, left, right, labels, window):
        return hlo.analyse(
            f"ENTRY %main (a: {left}, b: {right}) -> {result} {{\n"
            f"  %a = {left}{{}} parameter(0)\n  %b = {right}{{}} parameter(1)\n"
            f"  ROOT %c = {result}{{}} convolution(%a, %b), {window}dim_labels={labels}\n}}\n"
        ).flops

    assert line("f32[3,5]", "f32[3,7]", "f32[7,5]", "bf_io->bf", "") == 2 * 3 * 5 * 7
    window = "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, "
    batched = line("f32[4,3,5]", "f32[4,3,7]", "f32[4,7,5]", "0bf_0io->0bf", window)
    assert batched == 4 * 2 * 3 * 5 * 7
    same = "window={size=3 pad=1_1}, "
    padded = line("f32[1,6,1]", "f32[1,6,1]", "f32[3,1,1]", "b0f_0io->b0f", same)
    assert padded == 2 * (3 * 6 - 2)
