"""Parity with the original PyTorch code, layer by layer, in float32, on random mini checkpoints.

The tolerances come with the reference data: about five times the difference between the original's
float32 and float64 results.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import all_tokens, assert_close, by_original_name, enlarge, minis, padded_batch, probe

import vl2jax
from vl2jax.model.losses import batch_balance_loss, next_token_loss
from vl2jax.model.vl2 import VL2

CASES = (
    *("text_only", "one_image", "two_images", "three_images"),
    *("batch_leftpad", "train", "train_nopad"),
)


@pytest.mark.parametrize(("name", "case"), minis(cases=CASES))
def test_every_stored_intermediate(mini, name, case):
    model = mini(name, case)
    arrays = model.arrays(case)
    batch = padded_batch(model.config, arrays)
    output, state = probe(model, enlarge(batch, rows=3, length=256, tiles=24))
    real = arrays["in/attention_mask"]
    decoder, checked = state["decoder"], set()

    def check(key, got, atol, where=None):
        if f"out/{key}" in arrays:
            checked.add(f"out/{key}")
            assert_close(got, arrays[f"out/{key}"], atol, key, where)

    check("inputs_embeds", state["inputs_embeds"][0], 5e-5, real)
    check("final_norm", decoder["final_norm"][0], 1e-4, real)
    check("logits", output.logits, 3e-4, real)
    if len(batch.tiles):
        vision = state["vision"]
        check("patch_embed", vision["patch_embed_out"][0], 5e-5)
        for block in range(model.config.vision.layers):
            check(f"vision_block_{block}", vision["blocks"]["block_out"][0][block], 5e-5)
        check("vision_out", vision["vision_out"][0], 5e-5)
        check("projector_out", state["adaptor"]["projector_out"][0], 5e-5)
    for run in model.config.decoder.layer_runs:
        found = decoder[run.name]
        for i in range(run.count):
            layer = run.first + i
            check(f"attn_{layer}", found["attn_out"][0][i], 1e-4, real)
            check(f"mlp_{layer}", found["mlp_out"][0][i], 5e-4, real)
            check(f"layer_{layer}", found["layer_out"][0][i], 5e-4, real)
            if run.is_moe:
                routing = found["mlp"]["gate"]["routing"][0]
                order = np.argsort(routing.experts[i], axis=-1)
                for part, atol in ((routing.experts, 0), (routing.weights, 1e-4)):
                    name = "topk_idx" if atol == 0 else "topk_weight"
                    got = np.take_along_axis(np.asarray(part[i]), order, -1)
                    assert_close(got, arrays[f"router/{layer}/{name}"], atol, name, real)
    assert checked == {key for key in arrays if key.startswith("out/")}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "case"), minis(cases=("train", "train_nopad")))
def test_losses_and_gradients(mini, name, case):
    """Cross entropy, auxiliary loss and every stored gradient, with and without auxiliary loss.

    As in the original, the auxiliary loss counts padding and is not part of the reported loss.  The
    last padding token before a row must predict its first token.
    """
    model = mini(name, case)
    training = model.case(case)["training"]
    batch = padded_batch(model.config, model.arrays(case))
    whole_rows = batch.replace(segment_ids=np.ones_like(batch.segment_ids))
    has_aux = "loss_aux" in training
    layers = [n for run in model.config.decoder.layer_runs if run.is_moe for n in _numbers(run)]

    def objective(trained, with_aux):
        variables = {**model.params, "params": trained}
        output = VL2(model.config).apply(variables, batch, all_tokens(batch))
        total, count = next_token_loss(output.logits, whole_rows)
        loss, aux = total / count, output.balance.aux_loss
        return loss + with_aux * aux.sum(), (loss, aux)

    gradient = jax.jit(jax.grad(objective, has_aux=True))
    for tag, with_aux in (("noaux", 0.0), ("aux", 1.0)):
        if tag == "aux" and not has_aux:
            continue
        tree, (loss, aux) = gradient(model.params["params"], with_aux)
        assert loss == pytest.approx(training[f"loss_{tag}"], rel=2e-6)
        if has_aux:
            want = [training["aux_loss_per_layer"][str(layer)] for layer in layers]
            np.testing.assert_allclose(aux, want, rtol=5e-6)
        found = by_original_name(model.config, {"params": tree})
        _check_gradient_norms(found, training[f"grad_norms_{tag}"])
        if model.has(f"{case}_grads"):
            _check_gradients(found, model.arrays(f"{case}_grads"), tag)


def _numbers(run) -> range:
    return range(run.first, run.first + run.count)


def _check_gradient_norms(found, norms):
    assert len(norms) > 100
    for name, norm in norms.items():
        if norm is None:  # the original has no gradient: not converted, or not trained
            assert name not in found or not np.any(found[name]), name
        else:
            got = np.linalg.norm(found[name].astype(np.float64))
            assert got == pytest.approx(norm, rel=1e-4, abs=1e-6), name


def _check_gradients(found, arrays, tag):
    keys = [key for key in arrays if key.startswith(f"grad_{tag}/")]
    assert len(keys) > 10
    for key in keys:
        name, want = key.split("/", 1)[1], arrays[key]
        if name.endswith("e_score_correction_bias"):  # not a trained parameter here
            assert name not in found and not want.any()
        else:
            assert_close(found[name], want, 5e-5 * np.abs(want).max() + 1e-6, key)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "case"), minis(("mini-tiny", "mini-small", "mini-extra"), ("train", "train_nopad"))
)
def test_batch_wise_auxiliary_loss(mini, name, case):
    """The auxiliary loss with `seq_aux` false, computed from the same routing."""
    model = mini(name, case)
    batch = padded_batch(model.config, model.arrays(case))
    _, state = probe(model, batch)
    want = model.case(case)["training"]["aux_loss_per_layer_seq_aux_false"]
    assert want
    for run in model.config.decoder.layer_runs:
        for i, layer in enumerate(_numbers(run) if run.is_moe else ()):
            routing = state["decoder"][run.name]["mlp"]["gate"]["routing"][0]
            mask = jnp.ones(batch.tokens.shape, bool)
            loss = batch_balance_loss(routing.scores[i], routing.experts[i], mask)
            loss *= model.config.decoder.aux_loss_alpha
            assert loss == pytest.approx(want[str(layer)], rel=5e-6)


def test_bfloat16_checkpoint(mini):
    """With bfloat16 weights, computing in bfloat16 stays close to computing in float32."""
    model = mini("mini-small", "one_image")
    arrays = model.arrays("one_image")
    batch = padded_batch(model.config, arrays)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    reference = vl2jax.forward(model.config, params, batch, dtype=jnp.float32)
    computed = vl2jax.forward(model.config, params, batch)
    assert computed.dtype == jnp.float32
    scale = np.abs(reference).max()
    assert 0 < np.abs(computed - reference).mean() / scale < 0.01


def test_bfloat16_reference(reference, tmp_path):
    """mini-small-bf16, with the tokenizer files of mini-small.

    Computing in float32 gives the original's logits.  Computing in bfloat16, the mean error is less
    than twice the original's.
    """
    import shutil

    from convert import to_jax

    source = tmp_path / "source"
    shutil.copytree(reference / "mini-small", source, ignore=shutil.ignore_patterns("golden"))
    for name in ("config.json", "model.safetensors"):
        (source / name).chmod(0o644)
        shutil.copyfile(reference / "mini-small-bf16" / name, source / name)
    to_jax.convert(source, tmp_path / "converted")
    model = vl2jax.load(tmp_path / "converted")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(model.params["params"]))
    arrays = np.load(reference / "mini-small-bf16" / "golden" / "one_image.npz")
    arrays = {**arrays, "in/labels": np.full_like(arrays["in/input_ids"], -100)}
    batch = padded_batch(model.config, arrays)
    logits = vl2jax.forward(model.config, model.params, batch, dtype=jnp.float32)
    assert_close(logits, arrays["f32_compute/logits"], 3e-4, "float32 compute")
    logits = vl2jax.forward(model.config, model.params, batch)
    exact = arrays["f32_compute/logits"]
    ours = np.abs(np.asarray(logits) - exact).mean()
    theirs = np.abs(arrays["bf16_compute/logits"] - exact).mean()
    assert ours < 2 * theirs
