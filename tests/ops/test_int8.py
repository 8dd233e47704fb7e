"""int8 weights: rounding errors are bounded; results equal those of the dequantised weights."""

import functools
import gc
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mesh_case
import numpy as np
import pytest
from golden import padded_batch

import vl2jax
from convert import random_hf, to_jax
from vl2jax.checkpoints import model_dir as checkpoint
from vl2jax.checkpoints.footprint import parameter_bytes
from vl2jax.checkpoints.model_dir import flatten
from vl2jax.common.errors import UserError
from vl2jax.config import PRESETS
from vl2jax.inference.sampling import SamplingParams
from vl2jax.inference.steps import compiled_steps
from vl2jax.model.decoder import init_caches
from vl2jax.model.moe import expert_stacks
from vl2jax.model.quantization import contracted_axes, quantize_tree
from vl2jax.model.vl2 import VL2, abstract_params
from vl2jax.ops import experts as expert_ops
from vl2jax.ops.experts import ExpertWeights
from vl2jax.ops.experts.reference import dense
from vl2jax.ops.experts.tpu_int8 import int8_experts
from vl2jax.ops.experts.xla import blocked
from vl2jax.ops.matmul import Int8, cast, dequantize, quantize
from vl2jax.ops.matmul.int8 import int8_sharding, scale_spec
from vl2jax.ops.platform import compiling_for
from vl2jax.parallel.mesh import AXES
from vl2jax.parallel.sharding import make_mesh, param_shardings, param_spec
from vl2jax.programs import eval as program
from vl2jax.programs import sample

pytestmark = pytest.mark.usefixtures("quick_compilation")


def is_int8(leaf) -> bool:
    return isinstance(leaf, Int8)


def dequantized(params):
    """Converts int8 weights to plain arrays."""
    return jax.tree.map(lambda w: dequantize(w, jnp.float32), params, is_leaf=is_int8)


class Loaded(NamedTuple):
    """An int8 model and the directory it was loaded from."""

    path: pathlib.Path
    model: vl2jax.Model


@pytest.fixture(scope="module")
def model(mini, tmp_path_factory):
    """A mini checkpoint with MLA and experts: unquantised with its golden cases, and as int8."""
    plain = mini("mini-small")
    target = tmp_path_factory.mktemp("quantize") / "model"
    to_jax.convert(plain.source, target)
    return plain, Loaded(target, vl2jax.load(target, quantize="int8"))


@pytest.mark.parametrize(
    ("shape", "axes"), [((6, 5), (0,)), ((2, 3, 4, 5), (1, 2)), ((4, 1), (0,))]
)
def test_each_element_is_off_by_half_a_scale_at_most(shape, axes):
    weight = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    weight *= np.logspace(-3, 3, shape[-1], dtype=np.float32)  # channels of all sizes
    weight[..., 0] = 0
    found = quantize(jnp.asarray(weight), axes)
    assert found.values.dtype == jnp.int8 and found.shape == shape
    assert found.scale.shape == tuple(1 if i in axes else n for i, n in enumerate(shape))
    error = np.abs(np.asarray(dequantize(found, jnp.float32)) - weight)
    assert (error <= np.asarray(found.scale) / 2 * (1 + 1e-5)).all()
    largest = np.abs(np.asarray(found.values)).max(axis=axes)
    assert (largest[..., 1:] == 127).all() and (largest[..., 0] == 0).all()


def test_what_is_not_finite_stays_so():
    weight = jnp.ones((3, 3)).at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf)
    wide = np.asarray(dequantize(quantize(weight, (0,)), jnp.float32))
    assert not np.isfinite(wide[:, :2]).any() and (wide[:, 2] == 1).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_all_integers_in_the_dtype_of_products(platform, dtype):
    integers = np.arange(-127, 128)
    weight = Int8(jnp.asarray(integers, jnp.int8), jnp.ones(1))
    with compiling_for(platform):
        values = cast(weight, dtype).values
    assert values.dtype == dtype
    np.testing.assert_array_equal(np.asarray(values, np.float32), integers)


@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_which_weights_are_quantized(preset):
    """All weights except those named here; scales are not sharded along summed axes."""
    kept = ("norm", "bias", "gate/kernel", "adaptor", "embed", "newline", "seperator")
    small, whole = 0, flatten(abstract_params(PRESETS[preset]()))
    for path, leaf in whole.items():
        axes = contracted_axes(path)
        assert any(name in path for name in kept) == (axes is None), path
        if axes:
            small += leaf.size
            spec = scale_spec(param_spec(path), axes)
            assert all(spec[axis] is None for axis in axes) and len(spec) == leaf.ndim
    assert small > 0.94 * sum(leaf.size for leaf in whole.values())


def test_logits(model):
    """Logits equal those of the dequantised weights, and are near those of the original weights."""
    plain, quantized = model
    batch = padded_batch(plain.config, plain.arrays("one_image"))
    exact, got, same = (
        np.asarray(vl2jax.forward(plain.config, params, batch))
        for params in (plain.params, quantized.model.params, dequantized(quantized.model.params))
    )
    size = np.abs(exact).max()
    assert np.abs(got - same).max() <= 1e-5 * size
    # Weights are off by up to 0.4% of the largest in their channel.  The errors of the logits are
    # large because this model is narrow: few errors average out in a sum.
    error = np.sqrt(np.mean((got - exact) ** 2)) / exact.std()
    assert 0.005 < error < 0.1


def test_generation(model):
    """Prefill and decoding, with absorbed attention and routed experts, give the same tokens."""
    plain, quantized = model
    images = plain.images(plain.case("one_image")["samples"][0])
    asked = [{"role": "user", "content": "<image>\nhow many?"}]
    asked = quantized.model.processor(asked, images[:1])
    answers = [
        [row.tokens for row in vl2jax.generate(plain.config, params, asked, max_new_tokens=12)]
        for params in (quantized.model.params, dequantized(quantized.model.params))
    ]
    assert answers[0] == answers[1] and len(set(answers[0][0])) > 3


def test_loading_holds_one_layer_beside_the_int8_model(model, monkeypatch):
    """Measures memory each time a weight, or a layer of one, has been read."""
    read, held, sizes = checkpoint.read_leaf, [], []

    def read_leaf(*arguments, **options):
        leaf = read(*arguments, **options)
        held.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        sizes.append(leaf.nbytes)
        return leaf

    monkeypatch.setattr(checkpoint, "read_leaf", read_leaf)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    loaded = vl2jax.load(model[1].path, quantize="int8")
    # The token embedding is the largest array that is read at once: float32[608, 64].
    assert max(sizes) == 4 * 64 * 608
    assert max(held) <= loaded.nbytes + max(sizes)


def test_what_is_on_the_device(model):
    """Loading gives the same as quantising in memory, and takes the predicted number of bytes."""
    plain, quantized = model
    assert quantized.model.size == sum(leaf.size for leaf in jax.tree.leaves(plain.params))
    assert quantized.model.nbytes == parameter_bytes(plain.config, jnp.float32, "int8")
    want = flatten(jax.jit(quantize_tree)(plain.params))
    for path, leaf in flatten(quantized.model.params).items():
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)
    experts = quantized.model.params["params"]["decoder"]["moe_1"]["mlp"]["experts"]
    assert {leaf.values.dtype for leaf in experts.values()} == {jnp.dtype(jnp.int8)}


def test_no_weight_is_widened_as_a_whole(model):
    """The temporary memory of a burst is smaller than the experts of all layers in float32."""
    plain, quantized = model
    steps = compiled_steps(plain.config, jnp.dtype("float32"), "cpu")
    arguments = (SamplingParams.create(), steps.empty_state(1, 32), np.int32([1]), 4, False)
    memory = steps.burst.lower(quantized.model.params, *arguments).compile().memory_analysis()
    experts = quantized.model.params["params"]["decoder"]["moe_1"]["mlp"]["experts"]
    assert memory.temp_size_in_bytes < 4 * sum(leaf.size for leaf in experts.values())


@pytest.mark.parametrize("implementation", [blocked, int8_experts])
def test_experts(implementation):
    """Each implementation uses one layer's values and scales from a stack of layers."""
    rng = np.random.default_rng(1)
    tokens, top, experts, width, hidden = 12, 2, 4, 16, 8
    x = rng.normal(0, 1, (tokens, width)).astype(np.float32)
    chosen = np.stack([rng.permutation(experts)[:top] for _ in range(tokens)]).astype(np.int32)
    weights = rng.random((tokens, top)).astype(np.float32)
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    stacks = ExpertWeights(
        *(quantize(jnp.asarray(rng.normal(0, 1, (2 * experts, *s))), (1,)) for s in shapes)
    )
    layer = jax.tree.map(lambda a: a[experts:], stacks)
    want = dense(x, weights, chosen, ExpertWeights(*(dequantize(w, jnp.float32) for w in layer)))
    np.testing.assert_allclose(dense(x, weights, chosen, layer), want, rtol=1e-6)
    options = {"interpret": True} if implementation is int8_experts else {}
    got = implementation(
        jnp.asarray(x), weights, chosen, stacks, first=experts, n_experts=experts, **options
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("routing", ["random", "one", "none"])
def test_the_tpu_kernel_reads_the_rows_of_each_expert(tokens, routing):
    """Experts with many tiles of rows, with none, and pairs whose expert is on another device."""
    rng = np.random.default_rng(tokens)
    top, experts, width, hidden = 2, 5, 32, 16
    chosen = np.stack([rng.permutation(experts + 1)[:top] for _ in range(tokens)])
    chosen = {"random": chosen, "one": chosen * 0 + 2, "none": chosen * 0 + experts}[routing]
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    w = ExpertWeights(
        *(quantize(jnp.asarray(rng.normal(0, 1, (experts, *s)), jnp.float32), (1,)) for s in shapes)
    )
    x = jnp.asarray(rng.normal(0, 1, (tokens, width)), jnp.bfloat16)
    weights = jnp.asarray(rng.random((tokens, top)) * (chosen < experts), jnp.float32)
    arguments = x, weights, jnp.asarray(chosen, jnp.int32)
    got = jax.jit(functools.partial(int8_experts, interpret=True))(*arguments, w)
    plain = ExpertWeights(*(dequantize(one, jnp.float32) for one in w))
    want = dense(x.astype(jnp.float32), *arguments[1:], plain)
    assert got.dtype == jnp.bfloat16
    size = max(np.abs(np.asarray(want)).max(), 1e-6)
    assert np.abs(np.asarray(got, np.float32) - np.asarray(want)).max() <= 0.03 * size


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 4096])
def test_the_tpu_kernel_serves_every_number_of_rows(rows):
    """The kernel, not a conversion of the layer; float32 goes to the loop over experts."""
    shape = jax.ShapeDtypeStruct
    values, scale = shape((64, 32, 16), jnp.int8), shape((64, 1, 16), jnp.float32)
    w = ExpertWeights(*(Int8(values, scale),) * 3)
    routing = shape((rows, 6), jnp.float32), shape((rows, 6), jnp.int32)
    with compiling_for("tpu"):
        for dtype, name in ((jnp.bfloat16, "int8"), (jnp.float32, "blocked")):
            assert expert_ops._EXPERTS.choose(shape((rows, 32), dtype), *routing, w).name == name


def test_loading_on_a_mesh(model):
    """Loading on a mesh gives the same weights; values and scales are sharded."""
    _, alone = model
    mesh = make_mesh(dict(zip(AXES, (2, 2, 2, 1), strict=True)))
    spread = vl2jax.load(alone.path, mesh=mesh, quantize="int8")
    want = flatten(alone.model.params)
    for path, leaf in flatten(spread.params).items():
        np.testing.assert_array_equal(leaf, want[path], err_msg=path)
    down = spread.params["params"]["decoder"]["moe_1"]["mlp"]["experts"]["down_proj"]
    layers, experts, hidden, width = down.shape
    parts = [leaf.sharding.shard_shape(leaf.shape) for leaf in (down.values, down.scale)]
    assert parts[0] == (layers, experts // 2, hidden, width // 2)
    assert parts[1] == (layers, experts // 2, 1, width // 2)


def test_answering_on_a_mesh():
    """Logits equal those of one device, on a mesh with axes `fsdp`, `expert` and `tensor`."""
    config = mesh_case.architecture("mla")
    state = mesh_case.start(mesh_case.recipe(config))
    params = {"params": state.params, "router": state.router}
    alone = jax.jit(quantize_tree)(params)
    mesh = make_mesh(dict(zip(AXES, (1, 2, 2, 2), strict=True)))
    where = flatten(param_shardings(mesh, params))

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = where[name]
        if is_int8(leaf):
            sharding = int8_sharding(sharding, contracted_axes(name))
        return jax.device_put(leaf, sharding)

    spread = jax.tree_util.tree_map_with_path(place, alone, is_leaf=is_int8)
    model, batch = VL2(config), mesh_case.prompts(8)
    text = batch.replace(tiles=batch.tiles[:0], image_index=np.full_like(batch.image_index, -1))
    x, positions = jnp.ones((1, 1, 32)), jnp.ones((1, 1), jnp.int32)

    @jax.jit
    def run(params):
        """Logits of eight prompts, whose tokens are exchanged, and one decoding step of one row."""
        caches = init_caches(config.decoder, 1, 8, jnp.float32)
        stacks = expert_stacks(params)
        hidden, _ = model.apply(stacks, x, positions, caches, method=VL2.decode)
        return model.apply(params, text).logits, hidden

    want = run(alone)
    with jax.set_mesh(mesh):
        got = run(spread)
    for one, other in zip(want, got, strict=True):
        assert np.abs(np.asarray(other) - one).max() <= 1e-5 * np.abs(one).max()


def test_unknown_kinds(model, capsys):
    with pytest.raises(UserError, match="quantize must be one of int8, or None; got 'int4'"):
        vl2jax.load(model[1].path, quantize="int4")
    for main, flags in ((sample.main, ["--prompt", "a"]), (program.main, ["--data", "synthetic"])):
        assert main(["--ckpt", str(model[1].path), *flags, "--quantize", "int4"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith("error: argument --quantize: invalid choice: 'int4' (choose from")


def test_the_command_line(model, capsys, tmp_path):
    """`--plan` reports sizes; `--batch` gives the same answers as `generate`.

    A run with the unquantised model refuses to continue the output file.
    """
    plain, quantized = model
    flags = ["--ckpt", str(quantized.path), "--max_new_tokens", "12", "--quantize", "int8"]
    assert sample.main([*flags, "--plan"]) == 0
    told = capsys.readouterr().err
    assert "466,227 parameters, float32 and int8, 773 kB on cpu" in told
    assert "cache 1.57 MB, with the parameters 2.35 MB" in told
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    files = [
        "--batch_size",
        "1",
        "--batch",
        str(tmp_path / "in.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    assert sample.main([*flags, *files]) == 0
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    asked = quantized.model.processor([{"role": "user", "content": "hello"}])
    (want,) = vl2jax.generate(
        *(plain.config, quantized.model.params, asked), max_new_tokens=12, eos_token_id=521
    )
    assert json.loads(line)["tokens"] == want.tokens
    assert sample.main([*flags[:-2], *files]) == 1
    assert "does not answer row 1" in capsys.readouterr().err


def test_eval_has_both_columns(tmp_path, capsys, monkeypatch):
    """The unquantised model answers half of the colour questions and all of the grounding ones.

    The quantised model answers half of the colour questions and only one grounding question.
    """
    (tmp_path / "hf").mkdir()
    random_hf.write_checkpoint(tmp_path / "hf")
    to_jax.convert(tmp_path / "hf", tmp_path / "ckpt")

    def answer_all(session, ask, wanted, batch_size, max_new_tokens):
        found = []
        for family, index in wanted:
            asked, quantized = ask(family, index), session.settings.get("quantize") == "int8"
            right = index % 2 == 0 if family == "colour" else not quantized or index == 0
            text = asked.answer if right else "nothing"
            found.append(program.Outcome(family, index, text, "stop", program.score(asked, text)))
        return found

    monkeypatch.setattr(program, "answer_all", answer_all)
    flags = ["--ckpt", str(tmp_path / "ckpt"), "--data", "synthetic", "--questions", "4"]
    flags += ["--families", "colour,grounding", "--compilation_cache", "off"]
    assert program.main([*flags, "--quantize", "int8"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["family", "measure", "unquantised", "int8", "difference"]
    assert rows[1] == ["colour", "exact", "match", "50.0%", "50.0%", "0.0%"]
    assert ["grounding", "Acc@0.5", "100.0%", "25.0%", "-75.0%"] in rows
    assert ["over", "families", "Acc@0.5", "100.0%", "25.0%", "-75.0%"] in rows
    assert rows[-1] == ["same", "answers:", "5", "of", "8"]
    assert program.main([*flags, "--quantize", "int8", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == json.loads((tmp_path / "ckpt" / "eval" / "scores.json").read_text())
    assert scores["families"]["grounding"]["acc50"] == 1.0
    assert scores["int8"]["families"]["grounding"]["acc50"] == 0.25
    assert scores["difference"]["families"]["grounding"]["acc50"] == -0.75
    assert scores["difference"]["families"]["colour"]["acc50"] is None
    written = (tmp_path / "ckpt" / "eval" / "answers-int8.jsonl").read_text().splitlines()
    assert len(written) == 8 and json.loads(written[5])["answer"] == "nothing"
    assert program.main(flags) == 0
    assert "unquantised" not in capsys.readouterr().out
