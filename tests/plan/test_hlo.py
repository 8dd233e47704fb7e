"""Costs of compiled programs, against programs whose costs are known."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.parallel.mesh import AXES
from vl2jax.parallel.sharding import make_mesh
from vl2jax.plan import cross_check, hlo
from vl2jax.plan.cross_check import check_products, check_total
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


def _steps(x, going, bound, step):
    """A product per iteration, while `going(i, bound)`."""

    def body(carry):
        i, x = carry
        return step(i), jnp.tanh(x @ x)

    return lambda start: jax.lax.while_loop(lambda c: going(c[0], bound), body, (start, x))[1]


@pytest.mark.parametrize(
    ("start", "going", "bound", "step", "trips"),
    [
        (0, jnp.less, 10, lambda i: i + 1, 10),
        (3, jnp.less, 10, lambda i: i + 1, 7),
        (0, jnp.less_equal, 7, lambda i: i + 3, 3),
        (7, jnp.greater, 0, lambda i: i - 2, 4),
        (7, jnp.greater_equal, 0, lambda i: i - 7, 2),
        (0, jnp.not_equal, 6, lambda i: i + 2, 3),
        (1, jnp.less, 100, lambda i: i * 2, 7),
        (9, jnp.less, 3, lambda i: i + 1, 0),
        (0.0, jnp.less, 3.5, lambda i: i + 1, 4),
        (jnp.uint8(250), jnp.not_equal, jnp.uint8(2), lambda i: i + jnp.uint8(1), 8),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_trip_counts_follow_from_start_condition_and_step(start, going, bound, step, trips, told):
    """Also if XLA does not tell them, as on TPU."""
    run = jax.jit(lambda x: _steps(x, going, bound, step)(start))
    compiled = run.lower(jnp.zeros((8, 8))).compile()
    text = compiled.as_text()
    found = hlo.analyse(text if told else text.replace("known_trip_count", "unknown"))
    assert found.flops == trips * 2 * 8**3 and not found.open_loops


@pytest.mark.parametrize(
    ("start", "going", "bound", "step"),
    [
        (None, jnp.less, 10, lambda i: i + 1),  # a traced start
        (0, jnp.less, None, lambda i: i + 1),  # a traced bound
        (0.0, lambda i, bound: i < bound, None, lambda i: i + 1.5),  # a traced float bound
        (1, jnp.greater, 0, lambda i: i * 1),  # no end
    ],
)
def test_loops_without_a_known_count_are_named(start, going, bound, step):
    def run(x, n):
        first, last = n if start is None else start, n if bound is None else bound
        return _steps(x, going, last, step)(first)

    compiled = jax.jit(run).lower(jnp.zeros((8, 8)), jnp.int32(3)).compile()
    found = hlo.analyse(compiled.as_text())
    assert found.flops == 2 * 8**3
    assert found.open_loops == ("jit(run)/while",)


def test_bounds_may_pass_through_an_outer_loop():
    """Counts that the outer loop carries unchanged are known inside; those that grow are not."""

    def run(x, count, grows):
        def body(_, carry):
            x, count = carry
            x = jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ x), x)
            return x, count + grows

        return jax.lax.fori_loop(0, 3, body, (x, count))[0]

    def found(count, grows):
        run_it = jax.jit(lambda x: run(x, count, grows))
        return hlo.analyse(run_it.lower(jnp.zeros((8, 8))).compile().as_text())

    assert found(5, 0).flops == 15 * 2 * 8**3 and not found(5, 0).open_loops
    assert found(5, 1).flops == 3 * 2 * 8**3 and len(found(5, 1).open_loops) == 1


def test_branches():
    """The branch that is taken, if the program says it; else the heaviest, and the name."""
    x = jnp.zeros((8, 8))

    def choose(*branches):
        return jax.jit(lambda x, n: jax.lax.switch(n, branches, x)).lower(x, jnp.int32(1)).compile()

    def heavy(x):
        return jnp.tanh(x @ x @ x)

    def light(x):
        return x

    for branches in ((heavy, light, jnp.flipud), (light, heavy, jnp.flipud), (light, heavy)):
        compiled = choose(*branches)
        found = hlo.analyse(compiled.as_text())
        assert found.flops == 2 * 2 * 8**3
        assert compiled.cost_analysis()["flops"] - found.flops <= 2  # XLA counts the choice, too
        assert len(found.open_loops) == 1 and found.open_loops[0].endswith("cond")
    text = choose(light, heavy).as_text()
    (call,) = re.findall(r"conditional\((%[\w.\-]+),", text)
    for index, flops in ((0, 0), (1, 2 * 2 * 8**3), (7, 2 * 2 * 8**3)):  # 7: the last branch
        known = re.sub(rf"{re.escape(call)} = (s32\[\]).*", rf"{call} = \1 constant({index})", text)
        found = hlo.analyse(known)
        assert found.flops == flops and not found.open_loops
    alike = hlo.analyse(choose(lambda x: x @ x, lambda x: x @ x).as_text())
    assert alike.flops == 2 * 8**3 and not alike.open_loops


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: jnp.einsum("abc,acd->abd", a, b),
        lambda a, b: jnp.einsum("abc,dce->abde", a, b),
        lambda a, b: jax.lax.conv_general_dilated(a, b, (2,), [(6, 5)], rhs_dilation=(2,)),
        lambda a, b: jax.lax.conv_general_dilated(a, b, (1,), [(2, 1)], lhs_dilation=(2,)),
    ],
)
def test_products_equal_the_count_of_xla(product):
    """One by one, and a program that is nothing else in all."""
    compiled = jax.jit(product).lower(jnp.zeros((6, 6, 6)), jnp.zeros((6, 6, 6))).compile()
    text = compiled.as_text()
    assert check_products(text) == 1
    assert hlo.analyse(text).flops == compiled.cost_analysis()["flops"]
    check_total(text, compiled.cost_analysis()["flops"])


def test_a_count_that_differs_from_xla_is_an_error(monkeypatch):
    compiled = jax.jit(_scan).lower(jnp.zeros((2, 8, 8)), jnp.zeros((8, 8))).compile()
    text, flops = compiled.as_text(), compiled.cost_analysis()["flops"]
    check_total(text, flops)  # with loops counted once
    with pytest.raises(ValueError, match="finds 1024 FLOPs of products, but XLA only 512 FLOPs"):
        check_total(text, 512)
    monkeypatch.setattr(cross_check, "product_flops", lambda *_: 1.0)
    with pytest.raises(ValueError, match=r"the counter says 1 FLOPs for \(8, 8\), XLA 1024"):
        check_products(text)


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


def test_a_slice_of_a_cast_stack_reads_only_the_slice():
    """XLA may put the cast, or a change of the layout, in front of the slice of a layer."""
    text = (
        "%cast (p: s8[7,4,8]) -> s8[7,4,8] {\n"
        "  %p = s8[7,4,8]{2,1,0} parameter(0)\n  ROOT %c = s8[7,4,8]{2,1,0} copy(%p)\n}\n"
        "%fused (s: s8[7,4,8], i: s32[]) -> f32[1,4,8] {\n"
        "  %s = s8[7,4,8]{2,1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %f = s8[7,4,8]{2,1,0} fusion(%s), kind=kLoop, calls=%cast\n"
        "  %w = f32[7,4,8]{2,1,0} convert(%f)\n"
        "  ROOT %d = f32[1,4,8]{2,1,0} dynamic-slice(%w, %i, %i, %i), dynamic_slice_sizes={1,4,8}\n"
        "}\n"
        "ENTRY %main (a: s8[7,4,8], b: s32[]) -> f32[1,4,8] {\n"
        "  %a = s8[7,4,8]{2,1,0} parameter(0)\n  %b = s32[] parameter(1)\n"
        "  ROOT %r = f32[1,4,8]{2,1,0} fusion(%a, %b), kind=kLoop, calls=%fused\n}\n"
    )
    found = hlo.analyse(text).traffic
    assert found == 32 + 32 * 4  # the layer as int8, and the result


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
