"""Matrix products with weights in both precisions, and remat policies, which change no result."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from mesh_case import drawn

from vl2jax.common.errors import UserError
from vl2jax.config import AdaptorConfig, DecoderConfig, VisionConfig, VL2Config
from vl2jax.model.layers import REMAT, GatedMLP, RMSNorm
from vl2jax.model.vl2 import VL2, abstract_params, init_variables
from vl2jax.ops.matmul import einsum
from vl2jax.processing.batch import TEXT, Batch
from vl2jax.training.chunked_loss import chunked_next_token_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = VL2Config(
    vision=VisionConfig(image_size=20, patch_size=4, width=8, layers=2, heads=2, mlp_ratio=2),
    adaptor=AdaptorConfig(input_dim=8, n_embed=12),
    decoder=DecoderConfig(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        topk_method="greedy",
        kv_lora_rank=6,
        q_lora_rank=None,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
    ),
    tile_tag="2D",
    candidate_resolutions=((20, 20),),
)


def _batch() -> Batch:
    """Two rows of 16 tokens; 9 tokens of each row are visual, from one tile."""
    random = np.random.default_rng(0)
    image_index = np.full((2, 16), TEXT, np.int32)
    image_index[0, 1:10] = 2 + np.arange(9)
    image_index[1, 1:10] = 11 + np.arange(9)
    return Batch(
        tiles=random.integers(0, 256, (2, 20, 20, 3), dtype=np.uint8),
        tokens=random.integers(0, 40, (2, 16), dtype=np.int32),
        image_index=image_index,
        positions=np.tile(np.arange(16, dtype=np.int32), (2, 1)),
        segment_ids=np.ones((2, 16), np.int32),
        loss_mask=image_index == TEXT,
    )


@functools.cache
def _params():
    return drawn(abstract_params(SMALL)["params"], 0.2)


def _loss(params, dtype=jnp.float32, config=SMALL, **options):
    batch = _batch()
    out = VL2(config, dtype, **options).apply({"params": params}, batch, with_logits=False)
    kernel = params["decoder"]["lm_head"]["kernel"]
    sums = chunked_next_token_loss(out.hidden, kernel, batch, dtype=dtype)
    return sums.loss_sum / sums.count + out.balance.aux_loss.sum()


@functools.cache
def _program(remat):
    """Loss and gradients of the model under one remat policy, compiled once for all tests."""
    return (
        jax.jit(jax.value_and_grad(functools.partial(_loss, remat=remat)))
        .lower(_params())
        .compile()
    )


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_no_gradient(remat):
    want, expected = jax.device_get(_program("none")(_params()))
    got, gradients = jax.device_get(_program(remat)(_params()))
    assert got == pytest.approx(float(want), rel=1e-6)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale),
        gradients,
        expected,
    )


def test_remat_saves_memory():
    """A policy that saves less of each layer needs less memory."""
    used = {name: _program(name).memory_analysis().temp_size_in_bytes for name in REMAT}
    assert used["full"] < used["dots"] < used["none"]


def test_unknown_remat():
    with pytest.raises(UserError, match="remat is 'some'; choose one of none, full, dots"):
        VL2(SMALL, remat="some")


def test_einsum_has_the_ordinary_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((2, 5, 3, 4), (4, 3, 6), (2, 5, 3, 6)), strict=True)
    )

    def gradients(product):
        return jax.grad(lambda x, w: (product("BTHN,NHC->BTHC", x, w) * g).sum(), (0, 1))(x, w)

    for got, want in zip(gradients(einsum), gradients(jnp.einsum), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def _products(jaxpr):
    """Dtypes (left, right, result) of all matrix products in a jaxpr and its inner jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in (*equation.invars, *equation.outvars))
        for inner in jaxprs_in_params(equation.params):
            yield from _products(inner)


def test_bfloat16_products_in_both_passes():
    """Operands are bfloat16, results float32; the weight's gradient is not rounded to bfloat16."""
    x = jax.random.normal(jax.random.key(1), (6, 12), jnp.bfloat16)
    module = GatedMLP(8, jax.nn.initializers.normal(0.3), jnp.bfloat16)
    params = nn.Module.init(module, jax.random.key(0), x)  # `init` is also an attribute
    gradient = jax.grad(lambda p, x: (module.apply(p, x).astype(jnp.float32) ** 2).sum(), (0, 1))
    found = list(_products(jax.make_jaxpr(gradient)(params, x).jaxpr))
    assert found == [("bfloat16", "bfloat16", "float32")] * 9
    d_params, d_x = gradient(params, x)
    assert d_x.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(d_params):
        assert leaf.dtype == jnp.float32
        assert np.any(leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_model_trains_in_bfloat16_from_float32_weights():
    """Gradients are float32 and near those of a float32 model; no product has mixed operands."""
    # Every token uses all experts, so rounding cannot change the routing.
    decoder = dataclasses.replace(SMALL.decoder, num_experts_per_tok=4)
    loss = functools.partial(_loss, config=dataclasses.replace(SMALL, decoder=decoder))
    params = _params()
    gradient = jax.value_and_grad(functools.partial(loss, dtype=jnp.bfloat16))
    kinds = {kind[:2] for kind in _products(jax.make_jaxpr(gradient)(params).jaxpr)}
    assert ("bfloat16", "bfloat16") in kinds
    assert not any(left != right for left, right in kinds)
    got, gradients = jax.device_get(jax.jit(gradient)(params))
    want, expected = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
    assert got == pytest.approx(float(want), rel=1e-3)
    norms = []
    for rounded, exact in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert rounded.dtype == np.float32
        norms.append((np.sum((rounded - exact) ** 2), np.sum(exact**2)))
    wrong, size = np.sum(norms, axis=0)
    assert wrong < 0.03**2 * size


@pytest.mark.parametrize(
    "scale, found", [({}, "missing"), ({"scale": jnp.ones(3)}, r"of shape \(3,\)")]
)
def test_a_parameter_that_does_not_fit(scale, found):
    with pytest.raises(ValueError, match=rf"scale is {found}; the model has one of shape \(4,\)"):
        RMSNorm(1e-6).apply({"params": scale}, jnp.ones((2, 4)))


@pytest.mark.parametrize("topk_method", ["greedy", "noaux_tc"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_are_those_of_drawn_parameters(topk_method, dtype):
    groups = dict(n_group=2, topk_group=1)
    decoder = dataclasses.replace(SMALL.decoder, topk_method=topk_method, **groups)
    config = dataclasses.replace(SMALL, decoder=decoder)
    model = VL2(config, param_dtype=dtype)
    drawn_ones = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
    assert ("router" in drawn_ones) == (topk_method == "noaux_tc")
    assert abstract_params(config, dtype) == drawn_ones
