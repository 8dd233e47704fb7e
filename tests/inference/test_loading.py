"""Loading a model, and the public interface of the package."""

import subprocess
import sys

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
