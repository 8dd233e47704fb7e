"""Tests of configurations: presets equal the released files, and bad values are rejected."""

import dataclasses
import json

import jax
import pytest

from convert.mapping import target_shapes
from vl2jax.checkpoints.model_dir import flat_shapes
from vl2jax.config import architecture as configs
from vl2jax.config.schema import ConfigError
from vl2jax.model.vl2 import abstract_params

SIZES = ("tiny", "small", "base")


@pytest.fixture
def hf(data_dir):
    """A mutable config.json."""
    return json.loads((data_dir / "mini-extra" / "config.json").read_text())


@pytest.mark.parametrize("size", SIZES)
def test_presets_are_the_released_files(reference, size):
    released = json.loads((reference / "released-configs" / f"{size}.json").read_text())
    config = configs.VL2Config.from_hf(released)
    assert config == configs.PRESETS[size]()
    _assert_within(released, config.to_hf())


def _assert_within(part, whole):
    for key, value in part.items():
        if isinstance(value, dict):
            _assert_within(value, whole[key])
        else:
            assert whole[key] == value, key


@pytest.mark.parametrize("size", SIZES)
def test_to_hf_is_the_inverse(size):
    config = configs.PRESETS[size]()
    text = json.dumps(config.to_hf())
    assert configs.VL2Config.from_hf(json.loads(text)) == config


def test_absent_fields_take_the_original_defaults(hf):
    config = configs.VL2Config.from_hf(hf)
    assert config.vision.heads == 1
    assert config.decoder.aux_loss_alpha == 0.05
    assert (config.decoder.scoring_func, config.decoder.norm_topk_prob) == ("softmax", False)
    assert config.decoder.rope_scaling.mscale_all_dim == 0.8
    assert configs.VL2Config.from_hf(config.to_hf()) == config


def test_layer_runs(hf):
    decoder = configs.VL2Config.from_hf(hf).decoder
    assert [run.name for run in decoder.layer_runs] == ["dense_0", "moe_2", "dense_3", "moe_4"]
    assert [run.count for run in decoder.layer_runs] == [2, 1, 1, 1]
    assert [run.count for run in configs.base().decoder.layer_runs] == [1, 29]
    dense = dataclasses.replace(decoder, n_routed_experts=None)
    assert [tuple(run) for run in dense.layer_runs] == [("dense_0", False, 0, 5)]


@pytest.mark.parametrize("size", SIZES)
def test_model_has_the_shapes_of_the_mapping(size):
    """Compares shapes only.  Tests of `convert` compare the mapping with released manifests."""
    config = configs.PRESETS[size]()
    assert flat_shapes(abstract_params(config)) == target_shapes(config)


@pytest.mark.parametrize(
    ("size", "unused"), [("tiny", 15238352), ("small", 15238352), ("base", 15238352)]
)
def test_parameter_counts(reference, size, unused):
    manifest = json.loads((reference / f"manifest-{size}.json").read_text())
    total = sum(_product(shape) for shape, _ in manifest.values())
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(configs.PRESETS[size]())))
    assert ours == total - unused


def _product(shape):
    result = 1
    for size in shape:
        result *= size
    return result


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        (None, "tile_tag", "1D", ["tile_tag", "'1D'", "'2D'"]),
        (None, "global_view_pos", "middle", ["global_view_pos", "'middle'"]),
        (None, "model_type", "llava", ["model_type", "'llava'"]),
        (None, "candidate_resolutions", [[70, 71]], ["candidate_resolutions", "70"]),
        (None, "candidate_resolutions", [70, 70], ["candidate_resolutions", "[width, height]"]),
        ("projector_config", "projector_type", "linear", ["projector_type", "'linear'"]),
        ("projector_config", "token_pooling", True, ["token_pooling"]),
        ("projector_config", "n_embed", 99, ["n_embed 99", "hidden_size 72"]),
        ("projector_config", "dept", 3, ["dept", "'depth'"]),
        ("vision_config", "heads", 7, ["72", "7"]),
        ("vision_config", "global_pool", "avg", ["global_pool", "'avg'"]),
        ("vision_config", "layers", "three", ["layers", "'three'"]),
        ("language_config", "hidden_act", "gelu", ["hidden_act", "'gelu'"]),
        ("language_config", "topk_method", "gready", ["topk_method", "'gready'"]),
        ("language_config", "num_experts_per_tok", 9, ["num_experts_per_tok 9"]),
        ("language_config", "n_group", 3, ["n_group 3"]),
        ("language_config", "tie_word_embeddings", True, ["tie_word_embeddings"]),
        ("language_config", "hiden_size", 72, ["hiden_size", "'hidden_size'"]),
        ("language_config", "rope_scaling", {"type": "su", "factor": 2}, ["rope_scaling", "'su'"]),
        ("language_config", "rope_scaling", {"type": "yarn"}, ["rope_scaling", "factor"]),
        ("language_config", "use_mla", False, ["yarn"]),
    ],
)
def test_refused_by_name(hf, section, field, value, words):
    (hf if section is None else hf[section])[field] = value
    with pytest.raises(ConfigError) as error:
        configs.VL2Config.from_hf(hf)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_all_problems_at_once(hf):
    hf["tile_tag"] = "1D"
    hf["language_config"]["hidden_act"] = "relu"
    with pytest.raises(ConfigError, match=r"tile_tag.*hidden_act"):
        configs.VL2Config.from_hf(hf)


def test_not_a_vl2_config():
    with pytest.raises(ConfigError, match="language_config"):
        configs.VL2Config.from_hf({"model_type": "llama", "hidden_size": 4096})


def test_transformers_extras_are_no_error(hf):
    hf |= {"architectures": ["DeepseekVLV2ForCausalLM"], "_name_or_path": "x", "use_cache": True}
    hf["vision_config"]["torch_dtype"] = "bfloat16"
    assert configs.VL2Config.from_hf(hf).vision.width == 72
