"""The chunked loss on meshes of eight devices, against one device, and its communication."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.parallel.mesh import AXES, BATCH_AXES, batch_shards
from vl2jax.parallel.sharding import make_mesh, param_spec
from vl2jax.plan.hlo import analyse
from vl2jax.processing.batch import Batch
from vl2jax.training.chunked_loss import chunked_next_token_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, TOKENS, WIDTH, VOCAB = 8, 24, 16, 64
COLUMNS = 5  # columns per block if a device has one row
MESHES = {
    "data=2,fsdp=2,expert=2": (2, 2, 2, 1),
    "data=2,fsdp=2,tensor=2": (2, 2, 1, 2),
    "tensor=8": (1, 1, 1, 8),
}


@pytest.fixture(scope="module")
def case():
    """Rows with none to all tokens supervised, and inputs some of which predict correctly."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS)).astype(np.int32)
    mask = rng.random((ROWS, TOKENS)) < np.linspace(0, 1, ROWS)[:, None]
    zeros = np.zeros_like(tokens)
    batch = Batch(np.zeros((0, 2, 2, 3), np.uint8), tokens, zeros - 1, zeros, zeros + 1, mask)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    hidden = rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)
    hidden[:, :12] += kernel.T[tokens[:, 1:13]]
    return hidden, kernel, batch


def sums_and_gradients(argnums: tuple[int, ...], chunk: int):
    """A jitted function that returns the sums, and the gradients of three times the loss."""

    def loss(hidden, kernel, batch):
        sums = chunked_next_token_loss(hidden, kernel, batch, dtype=jnp.float32, chunk=chunk)
        return 3 * sums.loss_sum, sums

    if not argnums:
        return jax.jit(lambda *a: (loss(*a)[1], ()))

    def both(*arguments):
        gradients, sums = jax.grad(loss, argnums=argnums, has_aux=True)(*arguments)
        return sums, gradients

    return jax.jit(both)


@functools.cache
def compiled(argnums: tuple[int, ...], shape: tuple[int, ...], rows: int = ROWS):
    """The program compiled for a mesh, and the shardings of its arguments."""
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)))
    split = rows % batch_shards(mesh) == 0
    by_rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES if split else None))
    head = NamedSharding(mesh, param_spec("decoder/lm_head/kernel"))

    def array(shape, dtype, sharding=by_rows):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    numbers = array((rows, TOKENS), jnp.int32)
    tiles = array((0, 2, 2, 3), jnp.uint8, NamedSharding(mesh, PartitionSpec()))
    supervised = array((rows, TOKENS), jnp.bool_)
    inputs = (
        array((rows, TOKENS, WIDTH), jnp.float32),
        array((WIDTH, VOCAB), jnp.float32, head),
        Batch(tiles, *(numbers,) * 4, supervised),
    )
    with jax.set_mesh(mesh):
        held = rows // batch_shards(mesh) if split else rows
        program = sums_and_gradients(argnums, held * COLUMNS).lower(*inputs).compile()
    return program, jax.tree.map(lambda a: a.sharding, inputs)


@pytest.mark.parametrize(
    ("mesh", "argnums", "rows"),
    [
        *((mesh, (0, 1), ROWS) for mesh in MESHES),
        ("data=2,fsdp=2,tensor=2", (0,), ROWS),  # a frozen head
        ("data=2,fsdp=2,tensor=2", (), ROWS),
        ("data=2,fsdp=2,expert=2", (0, 1), 7),  # rows that the mesh does not divide
    ],
)
def test_equals_one_device(case, mesh, argnums, rows):
    hidden, kernel, batch = case
    batch = jax.tree.map(lambda a: a[-rows:], batch)
    program, places = compiled(argnums, MESHES[mesh], rows)
    got, gradients = program(*jax.device_put((hidden[-rows:], kernel, batch), places))
    want, expected = sums_and_gradients((0, 1), 64)(hidden[-rows:], kernel, batch)
    assert 0 < want.correct < want.count
    assert (got.correct, got.count) == (want.correct, want.count)
    assert float(got.loss_sum) == pytest.approx(float(want.loss_sum), rel=1e-6)
    for place, gradient in zip(argnums, gradients, strict=True):
        scale = np.abs(expected[place]).max()
        np.testing.assert_allclose(gradient, expected[place], rtol=0, atol=1e-6 * scale)


def collectives(argnums: tuple[int, ...], shape: tuple[int, ...]):
    """Collectives of a program; a loop of data-dependent length counts 1000 iterations."""
    text = compiled(argnums, shape)[0].as_text()
    found = analyse(text, open_trips=lambda _: 1000).collectives
    return [c for c in found if len(c.group) > 1]


def large(found):
    """Collectives that move more than a few numbers per token of a block."""
    return sorted((c.kind, round(c.nbytes)) for c in found if c.nbytes > 256)


def test_nothing_travels_between_blocks():
    """The kernel is gathered once, its gradient is reduced once, and the loss is two numbers."""
    found = collectives((0, 1), MESHES["data=2,fsdp=2,expert=2"])
    assert {c.count for c in found} == {1}
    head = 4 * WIDTH * VOCAB
    assert large(found) == [
        *(("all-gather", head), ("all-reduce", head // 2), ("reduce-scatter", head))
    ]


def test_a_split_vocabulary_meets_only_over_tensor():
    """Within the loop, devices exchange a few numbers per token, over `tensor` only."""
    found = collectives((0, 1), MESHES["data=2,fsdp=2,tensor=2"])
    between = [c for c in found if c.count > 1]
    assert between and not large(between)
    assert {c.group for c in between} == {(0, 1)}  # `tensor` is the last axis


def test_a_frozen_head_is_gathered_and_not_summed():
    found = collectives((0,), MESHES["data=2,fsdp=2,expert=2"])
    assert large(found) == [("all-gather", 4 * WIDTH * VOCAB)]
