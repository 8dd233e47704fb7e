"""Conversion with --overwrite replaces only what a conversion wrote."""

import os
import shutil
from pathlib import Path

import pytest
from convert_case import write_source

from convert import to_hf, to_jax
from convert.ownership import STAGING, not_ours
from vl2jax.checkpoints.completeness import MARKER
from vl2jax.common.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(scope="module")
def converted(source) -> Path:
    to_jax.convert(source, source.parent / "model")
    return source.parent / "model"


@pytest.fixture
def model(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def tree(path: Path) -> list[tuple]:
    return sorted((str(file), file.stat().st_ino) for file in path.rglob("*"))


ADDED = {
    "a training run": "checkpoints/10/params/manifest.ocdbt",
    "the configuration of a run": "config.json",
    "metrics": "metrics.jsonl",
    "results of eval.py": "eval/scores.json",
    "a note": "notes.txt",
    "a file among the parameters": "params/mine.npy",
    "another checkpoint below": "params/d/deep/mine.npy",
    "a hidden file": ".env",
}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("what", ADDED)
def test_what_a_user_has_added_stays(what, marked, model, source):
    if not marked:
        (model / MARKER).unlink()
        if ADDED[what] == "params/d/deep/mine.npy":
            return  # files of that name were Orbax's then
    added = model / ADDED[what]
    added.parent.mkdir(parents=True, exist_ok=True)
    added.touch()
    before = tree(model)
    with pytest.raises(UserError, match=f"--overwrite may replace: it has {ADDED[what][:4]}"):
        to_jax.convert(source, model, overwrite=True)
    assert tree(model) == before
    assert os.listdir(model.parent) == ["model"]


def test_a_workdir_before_its_first_checkpoint_stays(model, source):
    shutil.rmtree(model / "params")
    with pytest.raises(UserError, match="it has no params, so it is not a converted model"):
        to_jax.convert(source, model, overwrite=True)
    assert (model / "model.json").exists()


@pytest.mark.parametrize("marked", [True, False])
def test_a_converted_model_is_replaced(marked, model, source):
    if not marked:
        (model / MARKER).unlink()
    (model / "tokenizer.json").write_text("{}")
    assert not_ours(model) is None
    to_jax.convert(source, model, overwrite=True)
    assert (model / "tokenizer.json").read_text() != "{}"
    assert os.listdir(model.parent) == ["model"]
    assert not (model / STAGING).exists()


def test_a_link_is_followed(model, source, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(model)
    before = (model / "model.json").stat().st_ino
    to_jax.convert(source, link, overwrite=True)
    assert link.is_symlink() and (model / "model.json").stat().st_ino != before


@pytest.mark.parametrize("name", ["model.partial", ".model.replaced"])
def test_folders_with_the_names_of_our_temporary_ones_stay(name, model, source, converted):
    mine = model.parent / name / "thesis.tex"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(UserError, match=f"{name} is in the way, and no conversion left it; move"):
        to_jax.convert(source, model, overwrite=True)
    assert mine.exists() and not_ours(model) is None
    if name == "model.partial":
        mine.parent.rename(model.parent / "other.partial")
        with pytest.raises(UserError, match="is in the way, and no conversion left it"):
            to_hf.convert(converted, model.parent / "other")
