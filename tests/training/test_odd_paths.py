"""Checkpoints in directories with unusual names are written, and read again."""

import jax
import numpy as np
import pytest
from convert_case import read_all, write_source
from workdir_case import state

from convert import to_hf, to_jax
from vl2jax.checkpoints.plain_names import plain_name
from vl2jax.common.errors import UserError
from vl2jax.training.workdir import Workdir

NAME = "a#b?c%20|d\\e[1] 目录"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", [*NAME.split(), "100%", "*", "[x].d", "file:", "a:b"])
def test_workdir(name, tmp_path):
    params, opt_state = state(1)
    likes = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        for x in (params, opt_state)
    ]
    path = tmp_path / name / "run"
    with Workdir(path, keep=1, keep_every=None) as workdir:
        workdir.save(3, params=params, opt_state=opt_state, data_state={"n": 1}, wait=True)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == [name]
    with Workdir(path.as_uri(), keep=1, keep_every=None) as workdir:
        step, read, _, data = workdir.restore(like_params=likes[0], like_opt_state=likes[1])
    assert (step, data) == (3, {"n": 1})
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_conversion_there_and_back(tmp_path):
    (tmp_path / NAME).mkdir()
    source = write_source(tmp_path / NAME / "hf")
    to_jax.convert(source, tmp_path / NAME / "model", check=True)
    to_hf.convert(tmp_path / NAME / "model", tmp_path / NAME / "back")
    kept = {k: v for k, v in read_all(source).items() if not k.startswith("vision.attn_pool.")}
    assert read_all(tmp_path / NAME / "back") == kept


def test_one_link_serves_all_directories_below(tmp_path):
    odd = tmp_path / "a[1]"
    odd.mkdir()
    assert plain_name(odd / "x" / "y") == plain_name(odd) / "x" / "y"
    assert len(list((tmp_path / "cache" / "vl2jax" / "paths").iterdir())) == 1
    assert plain_name(odd).resolve() == odd


def test_no_link_can_be_made(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(
        UserError, match=r"has a backslash or a bracket, and a link to it could not"
    ):
        plain_name(tmp_path / "a[1]")
