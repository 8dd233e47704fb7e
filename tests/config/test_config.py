"""Tests of configurations: presets equal the released files, and bad values are rejected."""

import dataclasses
import itertools
import json
import typing

import jax
import pytest

from convert.mapping import target_shapes
from vl2jax.checkpoints.model_dir import flat_shapes
from vl2jax.config import architecture as configs
from vl2jax.config.checks import RANGES
from vl2jax.config.processor import ProcessorConfig
from vl2jax.config.ranges import Range, at_least
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


# What no field of a configuration can be without being checked.
ODD = (None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e300, float("nan"))
ODD += (
    float("inf"),
    "",
    "x" * 10_000,
    "2",
    "\n\x1b",
    [],
    [1],
    [[]],
    [[76]],
    [[76, -76]],
    {},
    {"a": 1},
)


def fields_of(values, path=()):
    """Paths of all fields of a nested object, and of the objects themselves."""
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from fields_of(value, (*path, name))


@pytest.mark.parametrize("drop", [False, True])
def test_no_value_of_any_field_is_more_than_one_line(hf, drop):
    """Each field of config.json with each odd value: a whole model, or one short line."""
    text, refused = json.dumps(configs.VL2Config.from_hf(hf).to_hf()), 0
    paths = list(fields_of(json.loads(text)))
    assert len(paths) > 80
    for path, value in itertools.product(paths, [None] if drop else ODD):
        changed = json.loads(text)
        node = changed
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value
        if drop:
            del node[path[-1]]
        try:
            config = configs.VL2Config.from_hf(changed)
        except ConfigError as error:
            refused += 1
            message = str(error)
            assert len(message) < 1000 and message.isprintable(), (path, value)
        else:
            assert len(config.decoder.layer_runs) <= 1000
            assert configs.VL2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert refused > (0 if drop else 500)


def test_all_numbers_have_a_range():
    parts = {
        "vision_config": configs.VisionConfig,
        "projector_config": configs.AdaptorConfig,
        "language_config": configs.DecoderConfig,
        "language_config.rope_scaling": configs.RopeScaling,
    }
    assert parts.keys() == RANGES.keys()
    for where, part in parts.items():
        hints = typing.get_type_hints(part)
        numbers = {
            name for name, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}
        }
        assert numbers == RANGES[where].keys(), where


@pytest.mark.parametrize(
    ("allowed", "inside", "out", "text"),
    [
        (Range(1, 5), (1, 5, 2.5), (0, 6, float("nan"), float("inf"), "2", None), "1 to 5"),
        (Range(0, 1, above=True), (1e-9, 1), (0, 0.0, -1), "above 0 and at most 1"),
        (at_least(0), (0, 10**9), (-1, 10**10), "at least 0"),
    ],
)
def test_ranges(allowed, inside, out, text):
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in out)
    assert str(allowed) == text


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("language_config", {"num_hidden_layers": 2**64}, "num_hidden_layers must be 1 to 1000"),
        ("language_config", {"moe_layer_freq": 0}, "moe_layer_freq must be 1 to 1000, got 0"),
        (
            "language_config",
            {"num_hidden_layers": 1000, "n_routed_experts": 8192},
            "about 2.46e+07 tensors",
        ),
        (
            "language_config",
            {"vocab_size": 2**24, "hidden_size": 2**20, "intermediate_size": 2**20},
            "parameters, more than 1e+13",
        ),
        ("vision_config", {"patch_size": 71}, "patch_size 71 is larger than image_size 70"),
        ("vision_config", {"mlp_ratio": 1e-9}, "leaves no width"),
        ("projector_config", {"depth": 10**9}, "projector_config.depth must be 1 to 64"),
    ],
)
def test_sizes_are_bounded_before_anything_is_made(hf, section, changes, words):
    hf[section] |= changes
    if "hidden_size" in changes:
        hf["projector_config"]["n_embed"] = changes["hidden_size"]
    with pytest.raises(ConfigError) as error:
        configs.VL2Config.from_hf(hf)
    assert words in str(error.value)


def test_candidate_resolutions_are_bounded(hf):
    side = hf["vision_config"]["image_size"]
    for pairs, words in (
        ([[side, side]] * 1001, "1 to 1000 pairs"),
        ([[side, side + 0.5]], r"\[width, height\] pairs"),
        ([[side * 1000, side * 1000]], "about 1e.06 tiles for one image"),
    ):
        hf["candidate_resolutions"] = pairs
        with pytest.raises(ConfigError, match=words):
            configs.VL2Config.from_hf(hf)


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        # transformers 4.5x and 5
        (None, {"dtype": "bfloat16", "_attn_implementation_autoset": True, "is_decoder": False}),
        ("language_config", {"head_dim": 8, "mlp_bias": False, "rope_interleave": True}),
        ("language_config", {"sliding_window": None, "some_setting_of_tomorrow": None}),
        (
            "language_config",
            {"_experts_implementation": "grouped_mm", "output_router_logits": True},
        ),
        # unsloth, PEFT, others
        (None, {"unsloth_version": "2025.3", "unsloth_fixed": True, "peft_version": "0.17"}),
        (None, {"transformers.js_config": {}, "trl_version": "1", "quantization_config": None}),
        ("vision_config", {"use_bfloat16": False, "output_attentions": False}),
    ],
)
def test_what_programs_write_is_read_and_named(hf, section, fields):
    plain = configs.VL2Config.from_hf(hf)
    before = configs.VL2Config.ignored_fields(hf)
    (hf if section is None else hf[section]).update(fields)
    assert configs.VL2Config.from_hf(hf) == plain
    prefix = f"{section}." if section else ""
    expected = {prefix + name for name in fields} - {"dtype"}  # the released files have it
    assert set(configs.VL2Config.ignored_fields(hf)) - set(before) == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"n_kv_experts": 3}, "unknown field 'language_config.n_kv_experts'"),
    ],
)
def test_what_changes_the_model_is_refused(hf, fields, words):
    hf["language_config"] |= fields
    with pytest.raises(ConfigError, match=words):
        configs.VL2Config.from_hf(hf)


def test_new_names_of_rope(hf):
    plain = configs.VL2Config.from_hf(hf)
    language = hf["language_config"]
    scaling = dict(language.pop("rope_scaling"))
    theta = language.pop("rope_theta", 10000.0)
    kind = scaling.pop("type")
    language["rope_parameters"] = {"rope_theta": theta, "rope_type": kind, **scaling}
    assert configs.VL2Config.from_hf(hf) == plain
    language["rope_scaling"] = {"rope_type": kind, "type": kind, **scaling}  # both, the same
    assert configs.VL2Config.from_hf(hf) == plain
    language["rope_theta"] = 5.0
    with pytest.raises(ConfigError, match=r"rope_theta 5.0 and rope_parameters.rope_theta"):
        configs.VL2Config.from_hf(hf)
    del language["rope_theta"], language["rope_scaling"]
    language["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    assert configs.VL2Config.from_hf(hf).decoder.rope_scaling is None


def test_several_end_tokens(hf):
    hf["language_config"]["eos_token_id"] = [1, 7]
    config = configs.VL2Config.from_hf(hf)
    assert config.decoder.eos_token_id == (1, 7)
    assert configs.VL2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_processor_fields_of_other_programs(data_dir):
    values = json.loads((data_dir / "mini-extra" / "processor_config.json").read_text())
    plain = ProcessorConfig.from_dict(values)
    more = {"chat_template": "{{x}}", "unsloth_version": "1", "do_resize": True, "size": {"a": 1}}
    assert ProcessorConfig.from_dict(values | more) == plain
    assert ProcessorConfig.ignored_fields(values | more) == list(more)
    assert ProcessorConfig.ignored_fields(values) == []
    with pytest.raises(ConfigError, match="unknown field 'image_mode'"):
        ProcessorConfig.from_dict(values | {"image_mode": "RGB"})
