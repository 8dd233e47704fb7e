"""The model files of a workdir, and loading the parameters that training starts from."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import to_jax
from vl2jax.checkpoints.model_dir import read_model_dir
from vl2jax.common.atomic_file import write_json
from vl2jax.common.errors import UserError
from vl2jax.config import architecture as presets
from vl2jax.model.vl2 import abstract_params
from vl2jax.parallel.sharding import param_shardings
from vl2jax.training.lineage import config_differences, init_params, prepare
from vl2jax.training.workdir import Workdir


@pytest.fixture(scope="module")
def model_dir(data_dir, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("model") / "converted"
    to_jax.convert(data_dir / "mini-small", target)
    return target


def changed(config, **fields):
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **fields))


def test_differences_of_architectures_are_named_as_in_config_json():
    base = presets.base()
    assert config_differences(base, base) == []
    other = changed(
        base, num_hidden_layers=28, rope_theta=5e5, aux_loss_alpha=0.5, torch_dtype=None
    )
    other = dataclasses.replace(other, candidate_resolutions=((384, 384),))
    assert config_differences(base, other) == [
        "language_config.num_hidden_layers is 30, not 28",
        "language_config.rope_theta is 10000.0, not 500000.0",
    ]


def test_first_use_makes_a_workdir_into_a_model_directory(model_dir, tmp_path):
    model = read_model_dir(model_dir)
    dropped = [{"tensors": ["a"], "reason": "unused"}]
    prepare(tmp_path / "new" / "run", model.config, model_dir, dtype="bfloat16", dropped=dropped)
    names = sorted(path.name for path in (tmp_path / "new" / "run").iterdir())
    assert names == [
        *("model.json", "processor_config.json", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    ]
    for name in names[1:]:
        assert (tmp_path / "new/run" / name).read_bytes() == (model_dir / name).read_bytes()
    content = json.loads((tmp_path / "new/run/model.json").read_text())
    assert (content["dtype"], content["source_dtype"]) == ("bfloat16", "bfloat16")
    assert content["dropped"] == dropped
    assert presets.VL2Config.from_hf(content["config"]) == model.config


def test_a_workdir_stays_with_its_model(model_dir, tmp_path):
    config = read_model_dir(model_dir).config
    prepare(tmp_path, config, model_dir)
    prepare(tmp_path, config, tmp_path / "not needed any more")
    prepare(tmp_path, changed(config, aux_loss_alpha=0.5), model_dir)
    with pytest.raises(UserError) as error:
        prepare(tmp_path, changed(config, num_experts_per_tok=1), model_dir, dtype="bfloat16")
    head, *lines = str(error.value).splitlines()
    assert head.startswith(f"workdir {tmp_path} is of another model; choose another workdir")
    was = config.decoder.num_experts_per_tok
    assert lines == [
        f"  - language_config.num_experts_per_tok is {was}, not 1",
        "  - parameters are float32, not bfloat16",
    ]


def test_directories_that_cannot_become_a_workdir(model_dir, tmp_path):
    config = read_model_dir(model_dir).config
    with pytest.raises(UserError, match=r"is a converted model, not a workdir; choose another"):
        prepare(model_dir, config, model_dir)
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(UserError, match=r"has no processor_config\.json; expected a model dir"):
        prepare(tmp_path / "run", config, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("from_workdir", [False, True])
def test_training_starts_from_a_model_or_from_another_run(model_dir, tmp_path, from_workdir):
    config = read_model_dir(model_dir).config
    abstract = abstract_params(config)
    mesh = jax.make_mesh((2, 2), ("fsdp", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shardings = param_shardings(mesh, abstract)
    source = model_dir
    if from_workdir:
        source = tmp_path
        prepare(tmp_path, config, model_dir)
        with Workdir(tmp_path, keep=1, keep_every=None) as workdir:
            params = init_params(model_dir, abstract, None, jnp.float32, config=config)
            workdir.save(5, params=params, opt_state={"n": jnp.int32(5)}, data_state={})
    params = init_params(source, abstract, shardings, jnp.bfloat16, config=config)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    exact = init_params(model_dir, abstract, None, jnp.float32)
    for got, want, sharding in zip(*map(jax.tree.leaves, (params, exact, shardings)), strict=True):
        assert (got.dtype, got.sharding) == (jnp.bfloat16, sharding)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want.astype(jnp.bfloat16)))


def test_another_architecture_is_reported_field_by_field(model_dir):
    config = read_model_dir(model_dir).config
    other = changed(config, num_experts_per_tok=1, routed_scaling_factor=3.0)
    with pytest.raises(UserError) as error:
        init_params(model_dir, abstract_params(other), None, jnp.float32, config=other)
    assert str(error.value).splitlines() == [
        f"the architecture of {model_dir} differs from the configuration:",
        f"  - language_config.routed_scaling_factor is {config.decoder.routed_scaling_factor},"
        " not 3.0",
        f"  - language_config.num_experts_per_tok is {config.decoder.num_experts_per_tok}, not 1",
    ]


def test_json_files_are_whole_or_old(tmp_path):
    write_json(tmp_path / "config.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"a": object()})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    write_json(tmp_path / "config.json", {"a": 2})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
