"""Loading a model, and the public interface of the package."""

import inspect
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vl2jax
from convert import random_hf, to_jax
from convert.random_source import write_weights


@pytest.fixture(scope="module")
def converted(data_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("api") / "model"
    to_jax.convert(data_dir / "mini-small", target)
    return target


def test_load_forward_generate(converted, data_dir):
    model = vl2jax.load(converted)
    assert isinstance(model.config, vl2jax.VL2Config)
    assert (model.size, model.nbytes) == (466227, 1864908)
    image = data_dir / "mini-small" / "golden" / "images" / "one_image_0_0.png"
    batch = model.processor([{"role": "user", "content": "<image>\nWhat is this?"}], [image])
    assert isinstance(batch, vl2jax.Batch)
    logits = vl2jax.forward(model.config, model.params, batch)
    assert logits.dtype == jnp.float32
    assert logits.shape == (*batch.tokens.shape, model.config.decoder.vocab_size)
    (answer,) = vl2jax.generate(model.config, model.params, batch, max_new_tokens=3)
    assert answer.tokens[0] == np.argmax(logits[0, -1])
    assert answer.text is None

    np.testing.assert_array_equal(model.forward(batch), logits)
    (told,) = model.generate(batch, max_new_tokens=3)
    assert told.tokens == answer.tokens
    assert told.text == model.processor.tokenizer.decode(told.tokens)
    *_, (rows, _) = model.stream(batch, max_new_tokens=3)
    (row,) = rows
    assert isinstance(row, vl2jax.Sequence) and isinstance(row.answer, vl2jax.Completion)
    assert isinstance(row.prompt, vl2jax.Prompt) and isinstance(row.result(), vl2jax.Generation)
    assert row.answer.text == told.text


def test_signatures():
    """All options are in the signatures, with their types and defaults, and `stream` has them all.

    So an editor, `help` and a type checker know them.
    """
    whole = inspect.signature(vl2jax.stream).parameters
    options = {name for name, one in whole.items() if one.kind is one.KEYWORD_ONLY}
    assert options == set(typing.get_type_hints(vl2jax.GenerateOptions))
    for function in (vl2jax.generate, vl2jax.Model.generate, vl2jax.Model.stream):
        found = inspect.signature(function).parameters
        assert {name for name, one in found.items() if one.kind is one.KEYWORD_ONLY} == options
        for name in options:
            assert found[name].default == whole[name].default
    assert list(inspect.signature(vl2jax.Model.generate).parameters)[:2] == ["self", "batch"]
    assert set(inspect.signature(vl2jax.Model.forward).parameters) == {
        *("self", "batch", "dtype", "moe_implementation")
    }
    for name in vl2jax.__all__:
        assert getattr(vl2jax, name) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("float32")])
def test_dtype(converted, dtype):
    model = vl2jax.load(converted, dtype)
    found = {leaf.dtype for leaf in jax.tree.leaves(model.params["params"])}
    assert found == {jnp.dtype(dtype)}


def test_router_state_stays_float32(tmp_path):
    """A sigmoid router's correction bias stays float32 when the other parameters are bfloat16."""
    (tmp_path / "hf").mkdir()
    random_hf.write_checkpoint(tmp_path / "hf")
    write_weights(tmp_path / "hf", random_hf.demo_config(), dtype="F32")  # more bits than bfloat16
    found = {}
    for dtype in ("bfloat16", "float32"):
        to_jax.convert(tmp_path / "hf", tmp_path / dtype, dtype=dtype)
        model = vl2jax.load(tmp_path / dtype)
        gate = model.params["router"]["decoder"]["moe_1"]["mlp"]["gate"]
        found[dtype] = gate["e_score_correction_bias"]
        assert found[dtype].dtype == jnp.float32
        assert model.params["params"]["image_newline"].dtype == jnp.dtype(dtype)
    assert np.any(found["float32"] != found["float32"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(found["bfloat16"], found["float32"])


def test_other_dtypes_are_refused(converted):
    with pytest.raises(vl2jax.UserError, match="int8"):
        vl2jax.load(converted, "int8")


def test_no_torch_and_no_transformers():
    """`import vl2jax` imports neither these nor packages for training and conversion only."""
    code = (
        "import sys, vl2jax; heavy = {'torch', 'transformers', 'orbax', 'grain', 'tensorflow',"
        " 'tensorstore'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
