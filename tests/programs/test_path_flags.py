"""Every path flag of every program is checked before anything is written."""

import os

import pytest
from conftest import ROOT
from smallest import get_config

from convert import random_hf, to_hf, to_jax
from vl2jax.cli.sample_flags import parse_flags
from vl2jax.cli.train_flags import FLAGS, define_flags, read_flags
from vl2jax.common.errors import UserError
from vl2jax.programs import eval as evaluation
from vl2jax.programs import train
from vl2jax.synthetic import __main__ as synthetic
from vl2jax.training.run_config import read_run_config

SAMPLE = ["--ckpt", "--messages", "--batch", "--out", "--draw", "--compilation_cache"]
FIELDS = ["init_from", "tokenizer", "data.images_root", "data.train", "data.heldout"]
BAD = ["ftp://host/x", "gs:/bucket/x", "~nobody_here/x", "file://host/x", " "]


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path):
    """An empty current directory, which stays empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", BAD)
@pytest.mark.parametrize("flag", SAMPLE)
def test_sample(flag, path):
    with pytest.raises(UserError, match=f"argument {flag}: the path"):
        parse_flags(["--ckpt=x", "--prompt=a", f"{flag}={path}"], None)


@pytest.mark.parametrize("path", BAD)
@pytest.mark.parametrize("flag", ["--ckpt", "--out", "--compilation_cache"])
def test_eval(flag, path):
    with pytest.raises(UserError, match=f"argument {flag}: the path"):
        evaluation.parse_flags(["--ckpt=x", "--data=synthetic", f"{flag}={path}"])


@pytest.mark.parametrize("path", BAD)
def test_conversions(path, monkeypatch, capsys):
    for program, count in ((to_jax, 2), (to_hf, 2), (random_hf, 1)):
        for place in range(count):
            arguments = ["x"] * count
            arguments[place] = path
            monkeypatch.setattr("sys.argv", ["convert", *arguments])
            assert program.main() == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: argument ") and "the path" in line


@pytest.mark.parametrize("path", BAD)
def test_synthetic(path, capsys):
    assert synthetic.main([f"--out={path}"]) == 1
    assert capsys.readouterr().err.startswith("error: argument --out: the path")


@pytest.mark.parametrize("path", BAD)
@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_configuration(name, path):
    values = get_config().to_dict()
    group, _, field = name.rpartition(".")
    (values[group] if group else values)[field] = path
    with pytest.raises(UserError, match=rf"{name} "):
        read_run_config(values)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("path", BAD)
@pytest.mark.parametrize("name", ["config", "workdir", "compilation_cache"])
def test_flags_of_train(name, path):
    if "workdir" not in FLAGS:
        define_flags(train.__doc__)
    config = f"--config={ROOT / 'tests' / 'smallest.py'}"
    with pytest.raises(UserError, match=f"^--{name} "):
        read_flags(["train.py", config, f"--{name}={path}"])
