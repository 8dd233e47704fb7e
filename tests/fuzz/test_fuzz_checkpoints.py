"""Fuzz target: a damaged checkpoint is refused in one short line, or falls back; it is never read
as other values.
"""

import shutil
from pathlib import Path

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from convert_case import write_source
from fuzz_case import fuzz, mutated
from workdir_case import save_two_steps, state

from convert import to_jax
from vl2jax.checkpoints.completeness import MARKER
from vl2jax.checkpoints.model_dir import load_params, read_model_dir
from vl2jax.training.workdir import Workdir


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def changes(whole: dict[str, bytes]) -> st.SearchStrategy[dict[str, bytes | None]]:
    """Other contents for a few files; None: the file is missing."""
    names = sorted(whole)
    seeds = {name: mutated([whole[name], *(b"", b"[]", b"{}", b"null")]) for name in names}
    one = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), st.none() | seeds[name] | seeds[name])
    )
    folders = st.sampled_from(sorted({name.split("/")[0] for name in names})).map(
        lambda folder: [(name, None) for name in names if name.split("/")[0] == folder]
    )
    parts = st.lists(one, min_size=1, max_size=3) | folders
    return st.builds(lambda some, marker: dict(some) | marker, parts, st.sampled_from(_MARKERS))


_MARKERS: list[dict[str, bytes | None]] = [{}, {}, {MARKER: None}]


def write(folder: Path, whole: dict[str, bytes], changed: dict[str, bytes | None]) -> None:
    """Makes the folder have the whole files, but for the changed ones."""
    for name, content in {**whole, **changed}.items():
        file = folder / name
        if content is None:
            file.unlink(missing_ok=True)
        elif not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)


def bits(tree) -> list[tuple]:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return [(leaf.dtype.name, leaf.shape, leaf.tobytes()) for leaf in leaves]


def test_models(tmp_path):
    to_jax.convert(write_source(tmp_path / "hf"), tmp_path / "model")
    path, whole = tmp_path / "model", contents(tmp_path / "model")
    before = bits(load_params(path / "params"))

    def read(changed):
        write(path, whole, changed)
        model = read_model_dir(path)
        assert bits(load_params(model.params)) == before

    assert fuzz(changes(whole), read)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_two_steps(path)
    return path


def test_workdirs(saved):
    newest = saved / "checkpoints" / "2"
    whole = contents(newest)
    wanted = {step: bits(state(step)) for step in (1, 2)}
    likes = {
        f"like_{name}": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        for name, tree in zip(("params", "opt_state"), state(0), strict=True)
    }

    def read(changed):
        for other in (saved / "checkpoints").glob("*.incomplete*"):
            shutil.rmtree(other)
        write(newest, whole, changed)
        with Workdir(saved, keep=9, keep_every=None, on_error=len) as workdir:
            step, params, opt_state, data_state = workdir.restore(**likes)
        assert bits((params, opt_state)) == wanted[step] and data_state == {"next": step}

    assert fuzz(changes(whole), read)
