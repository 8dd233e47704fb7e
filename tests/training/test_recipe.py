"""Table 2 of the paper, and checks of run configurations."""

import importlib.util

import ml_collections
import pytest
from conftest import ROOT

from vl2jax.common.errors import UserError
from vl2jax.training.recipe import STAGES, paper_run
from vl2jax.training.run_config import RunConfig, read_architecture, read_run_config


def load(name: str, *args) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


#            lr, steps, rows, schedule, moments, bias step, auxiliary weight
TABLE = {
    ("vl2_tiny", "align"): (5.4e-4, 1907, 256, "cosine", "float32", 0, 0.001),
    ("vl2_tiny", "pretrain"): (5.4e-4, 84612, 2304, "step", "float32", 0, 0.001),
    ("vl2_tiny", "sft"): (3.0e-5, 74387, 64, "constant", "float32", 0, 0.001),
    ("vl2_small", "align"): (4.2e-4, 1907, 256, "cosine", "float32", 0, 0.001),
    ("vl2_small", "pretrain"): (4.2e-4, 85714, 2304, "step", "float32", 0, 0.001),
    ("vl2_small", "sft"): (1.4e-5, 76294, 64, "constant", "float32", 0, 0.001),
    ("vl2_base", "align"): (4.5e-4, 1907, 256, "cosine", "bfloat16", 0, 0.0001),
    ("vl2_base", "pretrain"): (4.5e-4, 57874, 3360, "step", "bfloat16", 0.001, 0.0001),
    ("vl2_base", "sft"): (2e-5, 74387, 64, "constant", "bfloat16", 0, 0.0001),
}


@pytest.mark.parametrize(("size", "stage"), TABLE)
def test_table_2(size, stage):
    config = read_run_config(load(size, stage).to_dict())
    optim, balance = config.optim, config.balance
    got = (optim.lr, config.steps, config.batch.rows, optim.schedule, optim.moments_dtype)
    assert (*got, balance.bias_update_step, balance.aux_loss_alpha) == TABLE[size, stage]
    assert config.name == f"{size}-{stage}" and config.batch.length == 4096
    assert (optim.b1, optim.b2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert optim.lr_multipliers == {"vision": 0.1}
    assert optim.frozen == (("decoder",) if stage == "align" else ())
    assert (config.batch.segments > 1) == (stage != "align")  # packing
    assert config.data.supervise == ("answers" if stage == "sft" else "text")
    assert config.compute.param_dtype == "float32" and config.compute.dtype == "bfloat16"


def test_unknown_stage():
    with pytest.raises(UserError, match="stages align, pretrain, sft, got 'warm'"):
        paper_run("vl2_base", "warm")
    assert STAGES == ("align", "pretrain", "sft")


@pytest.mark.parametrize("name", ["tiny", "finetune", "vl2_tiny", "vl2_small", "vl2_base"])
def test_every_configuration_says_every_field(name):
    """Each configuration file sets all fields, and no others."""
    values = load(name).to_dict()
    config = read_run_config(values)
    for field in RunConfig.__dataclass_fields__:
        assert field in values, field
        part = getattr(config, field)
        if hasattr(part, "__dataclass_fields__"):
            assert set(values[field]) == set(part.__dataclass_fields__), field


def test_tiny_has_every_feature():
    architecture = read_architecture(read_run_config(load("tiny").to_dict()))
    decoder, vision = architecture.decoder, architecture.vision
    assert vision.grid % 2 == 1 and vision.image_size % vision.patch_size  # odd, pixels to spare
    assert len(architecture.candidate_resolutions) > 1
    assert decoder.use_mla and decoder.first_k_dense_replace == 1 and decoder.n_shared_experts == 2
    assert (decoder.scoring_func, decoder.topk_method) == ("sigmoid", "noaux_tc")
    assert decoder.norm_topk_prob and decoder.routed_scaling_factor == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(stepps=1), "unknown field 'stepps'; did you mean 'steps'"),
        (lambda c: c["optim"].update(learning_rate=1.0), "unknown field 'optim.learning_rate'"),
        (lambda c: c["batch"].update(rows="4"), "batch.rows must be"),
        (lambda c: c["batch"].update(microbatches=7), "must divide batch.rows"),
        (lambda c: c.pop("optim"), "optim"),
    ],
)
def test_mistakes(change, message):
    values = load("tiny").to_dict()
    change(values)
    with pytest.raises(UserError, match=message):
        read_run_config(values)


def test_profile():
    values = load("tiny").to_dict()
    assert read_run_config(values).profiled_steps is None
    assert read_run_config(values | {"profile": "3:7"}).profiled_steps == (3, 7)
    for wrong in ("7", "7:3", "a:b", "3:3"):
        with pytest.raises(UserError, match="profile must be START:STOP"):
            _ = read_run_config(values | {"profile": wrong}).profiled_steps
