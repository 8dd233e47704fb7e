"""Expert parallelism on a mesh against the reference implementation on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2jax.ops.experts import ExpertWeights
from vl2jax.ops.experts.exchange import choose_exchange, rows_sent
from vl2jax.ops.experts.reference import dense
from vl2jax.ops.experts.sharded import sharded_experts
from vl2jax.ops.experts.xla import blocked
from vl2jax.parallel.mesh import AXES
from vl2jax.parallel.sharding import make_mesh, param_shardings
from vl2jax.plan import hlo

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, D, F, E, K = 8, 6, 12, 8, 8, 3
PATH = "mlp/experts/{}_proj"


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    drawn = [jax.random.normal(k, s) / 3 for k, s in zip(keys[:3], shapes, strict=True)]
    scores = jax.random.normal(keys[3], (B, T, E))
    routing = {
        "random": jax.lax.top_k(scores, K)[1],
        "idle": jax.lax.top_k(scores[..., :4], K)[1] + 2,  # only experts 2 to 5
        "one": jnp.full((B, T, K), 5),  # all tokens to one expert, K times
    }
    x, weights = jax.random.normal(keys[4], (B, T, D)), jax.random.uniform(keys[5], (B, T, K))
    return x, weights, routing, ExpertWeights(*drawn)


def placed(mesh, w):
    """Shards weights by `PARAM_RULES`."""
    stacks = {PATH.format(n): leaf[None] for n, leaf in w._asdict().items()}
    tree = {"decoder": {"moe_1": stacks}}
    found = param_shardings(mesh, tree)["decoder"]["moe_1"]
    specs = [jax.sharding.PartitionSpec(*s.spec[1:]) for s in found.values()]
    where = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
    return jax.device_put(w, ExpertWeights(*where))


def value_and_gradients(f):
    def loss(x, weights, w, chosen):
        y = f(x, weights, chosen, w)
        return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@value_and_gradients
def oracle(x, weights, chosen, w):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen))
    return dense(*flat, w).reshape(x.shape)


def emulated(operand, output, *sizes, axis_name):
    """Implements the documentation of `ragged_all_to_all`, which the CPU backend lacks."""
    operands, *sizes = (jax.lax.all_gather(a, axis_name) for a in (operand, *sizes))
    offsets, counts, targets, _ = sizes
    me, slots = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        start, count = targets[source, me], counts[source, me]
        row = jnp.clip(offsets[source, me] + slots - start, 0, operand.shape[0] - 1)
        inside = (slots >= start) & (slots < start + count)
        output = jnp.where(inside[:, None], operands[source][row], output)
    return output


@pytest.mark.parametrize(
    ("shape", "exchange", "rows"),
    [
        ((1, 2, 2, 2), "gather", B),
        ((1, 2, 2, 2), "all_to_all", B),
        ((2, 1, 4, 1), "ragged", B),
        ((1, 1, 4, 2), "gather", 2),  # the mesh does not divide the rows: tokens are sharded
        ((1, 2, 2, 2), "gather", 1),  # few tokens: replicated
        ((1, 4, 1, 2), None, B),
    ],
)
def test_equals_one_device(case, monkeypatch, shape, exchange, rows):
    """Values and gradients; also with all tokens on one expert, and with idle experts."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    x, weights, routing, w = case
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)))
    with jax.set_mesh(mesh):
        here = jax.sharding.get_abstract_mesh()
        options = {"exchange": exchange, "implementation": "blocked"}
        f = value_and_gradients(functools.partial(sharded_experts, here, **options))
        for name, chosen in routing.items():
            got = f(x[:rows], weights[:rows], placed(mesh, w), chosen[:rows])
            want = oracle(x[:rows], weights[:rows], w, chosen[:rows])
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                scale = np.abs(b).max()
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_rows_of_other_places_do_no_harm(case):
    """Both implementations skip experts of other shards, which have id E and gate value 0."""
    x, weights, routing, w = case
    chosen = jnp.where(routing["random"] < 4, routing["random"], E).reshape(-1, K)
    kept = jnp.where(chosen < E, weights.reshape(-1, K), 0)
    found = [f(x.reshape(-1, D), kept, chosen, w) for f in (dense, blocked)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def form(platform: str, width: int, top_k: int = 6) -> str:
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((width,), ("expert",), abstract_device=device)
    return choose_exchange(mesh, top_k)


def test_the_form_suits_platform_and_width():
    assert form("cpu", 1) == form("tpu", 1) == "none"
    assert form("cpu", 8) == form("tpu", 4) == "gather"
    assert form("tpu", 8) == form("cuda", 32) == "ragged"
    assert form("tpu", 4, top_k=2) == "ragged" and form("tpu", 8, top_k=12) == "gather"


@pytest.mark.parametrize("width", [2, 4, 8])
def test_compiled_programs_send_what_the_choice_counts_on(case, width):
    """The bytes of a program's collectives, both ways, agree with `rows_sent`."""
    x, weights, routing, w = case
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": width, "tensor": 1}, jax.devices()[:width])
    n, out, back = (
        B * T // width,
        D * 4 + K * 8,
        D * 4,
    )  # bytes of a row with its choices, and of a sum
    found = {}
    with jax.set_mesh(mesh):
        here = jax.sharding.get_abstract_mesh()
        for name in ("gather", "all_to_all"):
            f = functools.partial(sharded_experts, here, implementation="dense", exchange=name)
            text = (
                jax.jit(f).lower(x, weights, routing["random"], placed(mesh, w)).compile().as_text()
            )
            found[name] = sum(c.count * c.sent for c in hlo.analyse(text).collectives)
            assert found[name] == pytest.approx(n * rows_sent(name, width, K) * (out + back)), name
    assert found[form("cpu", width, K)] <= min(found.values())


@pytest.mark.parametrize("width", [2, 4, 8, 16])
def test_a_ragged_exchange_sends_what_the_choice_counts_on(width):
    """The CPU lacks the operation, so this counts the destinations of random routings.

    Each token chooses six of 64 experts.
    """
    scores = np.random.default_rng(0).random((4096, 64))
    places = np.argsort(scores, axis=1)[:, :6] // (64 // width)
    others = [len(set(row) - {0}) for row in places.tolist()]  # of tokens on shard 0
    assert np.mean(others) == pytest.approx(rows_sent("ragged", width, 6), rel=0.05)
