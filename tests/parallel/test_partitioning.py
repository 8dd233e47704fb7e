"""How XLA partitions compiled programs: no array is gathered that need not be, and none twice."""

import collections
import os
import re
import tempfile

import jax
import jax.numpy as jnp
import mesh_case
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vl2jax.config import VisionConfig
from vl2jax.inference.steps import compiled_steps
from vl2jax.model.decoder import init_caches
from vl2jax.model.vision import VisionTower
from vl2jax.model.vl2 import abstract_params
from vl2jax.parallel.mesh import AXES, BATCH_AXES, constrain
from vl2jax.parallel.sharding import make_mesh, param_shardings
from vl2jax.plan import hlo

pytestmark = pytest.mark.usefixtures("quick_compilation")

# XLA's warning that it gathers a whole array on every device to change its sharding.
GATHERED = re.compile(r"involuntary full rematerialization.*", re.IGNORECASE)


def _warnings(compile_it) -> list[str]:
    """The warnings of a compilation; XLA writes them to the file descriptor of stderr."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            compile_it()
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return GATHERED.findall(file.read().decode())


def _mesh(*sizes: int) -> jax.sharding.Mesh:
    return make_mesh(dict(zip(AXES, sizes, strict=True)))


def _shapes(mesh, tree):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        *(tree, param_shardings(mesh, tree)),
    )


def test_the_warning_is_seen():
    mesh = _mesh(2, 2, 2, 1)

    def reshard(x):
        x = constrain(x, None, BATCH_AXES) * 2
        return jnp.tanh(constrain(x.reshape(4, 6, 8, 16), "expert", None, "fsdp", "data"))

    def compile_it():
        with jax.set_mesh(mesh):
            jax.jit(reshard).lower(jax.ShapeDtypeStruct((24, 128), jnp.float32)).compile()

    assert _warnings(compile_it)


@pytest.mark.parametrize(
    ("sizes", "rows"), [((2, 2, 2, 1), 3), ((1, 2, 2, 2), 3), ((4, 2, 1, 1), 6)]
)
def test_rows_and_tiles_that_do_not_divide_the_mesh(sizes, rows):
    """Encoding of tiles, prefill of whole prompts and decoding."""
    config, dtype = mesh_case.architecture("mla"), jnp.dtype(jnp.float32)
    mesh, steps = _mesh(*sizes), compiled_steps(config, dtype, "cpu")
    params = _shapes(mesh, abstract_params(config))
    shape, integers = jax.ShapeDtypeStruct, jnp.int32
    caches = jax.eval_shape(lambda: init_caches(config.decoder, rows, 64, dtype))
    tiles = shape((rows, 8, 8, 3), jnp.uint8)

    def compile_it():
        with jax.set_mesh(mesh):
            steps.encode.lower(
                params, shape((34, 32), dtype), tiles, shape((rows,), integers)
            ).compile()
            for length in (64, 1):
                x, positions = shape((rows, length, 32), dtype), shape((rows, length), integers)
                steps.prefill.lower(params, x, positions, caches).compile()

    assert _warnings(compile_it) == []


def _vision_collectives(*sizes: int) -> collections.Counter:
    """Collectives of one block, forward and backward: numbers by kind and devices in a group."""
    cfg = VisionConfig(image_size=16, patch_size=4, width=64, layers=7, heads=4)
    tower, mesh = VisionTower(cfg), _mesh(*sizes)
    tiles = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.uint8)
    params = jax.eval_shape(tower.init, jax.random.key(0), tiles)["params"]
    params = _shapes(mesh, {"vision": params})["vision"]

    def loss(params, tiles):
        return jnp.sum(tower.apply({"params": params}, constrain(tiles, BATCH_AXES)) ** 2)

    where = jax.tree.map(lambda leaf: leaf.sharding, params)
    split = jax.ShapeDtypeStruct(
        tiles.shape, tiles.dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss), out_shardings=where).lower(params, split).compile()
    found = collections.Counter()
    for one in hlo.analyse(compiled.as_text()).collectives:
        if one.count >= cfg.layers:  # in the scans over blocks
            found[one.kind, len(one.group)] += round(one.count / cfg.layers)
    return found


def test_vision_blocks_on_a_mesh_with_tensor():
    """Two sums over `tensor` forward and two backward; nothing is gathered.

    The gradients of weights are summed over `data`.
    """
    found = _vision_collectives(2, 1, 1, 4)
    assert found.pop(("all-reduce", 4)) == 4
    assert set(found) == {("all-reduce", 2)}


def test_vision_blocks_on_a_mesh_with_fsdp():
    """Only weights are gathered, for each pass, and their gradients are summed."""
    found = _vision_collectives(2, 2, 2, 1)
    assert found.pop(("all-gather", 2)) <= 8  # four weights
    assert {kind for kind, _ in found} <= {"all-reduce", "reduce-scatter"}
