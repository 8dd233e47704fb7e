"""Checkpoints, workdirs and data on object stores, through the same code as on local disks."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from convert_case import MICRO, read_all, write_source
from fake_stores import Store, serve
from workdir_case import state

from convert import to_hf, to_jax
from vl2jax.checkpoints.completeness import MARKER, complete_steps
from vl2jax.checkpoints.model_dir import CheckpointError, load_params, read_model_dir
from vl2jax.common import storage
from vl2jax.common.errors import UserError
from vl2jax.common.paths import user_path
from vl2jax.data.files import open_source
from vl2jax.processing.image import load_image
from vl2jax.training import lineage
from vl2jax.training.mirror import OWNER, mirrored
from vl2jax.training.remote_workdir import open_workdir

STORES = ("gs", "s3")


@pytest.fixture(scope="module")
def servers():
    """Both stores; TensorStore reads their addresses once per process."""
    for package in ("gcsfs", "s3fs"):
        pytest.importorskip(package)
    with (
        pytest.MonkeyPatch.context() as patch,
        serve("gs") as (gs, of_gs),
        serve("s3") as (s3, of_s3),
    ):
        for name, value in {**of_s3, **of_gs}.items():
            patch.setenv(name, of_s3[name] if name.startswith("AWS") else value)
        storage._file_system.cache_clear()
        yield {"gs": gs, "s3": s3}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Place:
    """A directory of one kind."""

    def __init__(self, kind: str, store: Store | None, folder: Path):
        self.kind, self.store, self.folder = kind, store, folder
        self.path = user_path(f"{kind}://bucket-1/{folder.name} #1" if store else folder, "x")

    def files(self) -> dict[str, bytes]:
        if self.store is None:
            found = (x for x in self.folder.rglob("*") if x.is_file())
            return {x.relative_to(self.folder).as_posix(): x.read_bytes() for x in found}
        prefix = f"{self.folder.name} #1/"
        return {x.removeprefix(prefix): self.store.objects[x] for x in self.store.keys(prefix)}

    def write(self, name: str, content: bytes | None) -> None:
        if self.store is None:
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink() if content is None else file.write_bytes(content)
        elif content is None:
            del self.store.objects[f"{self.folder.name} #1/{name}"]
        else:
            self.store.objects[f"{self.folder.name} #1/{name}"] = content


@pytest.fixture(params=(*STORES, "file"))
def place(request, servers, tmp_path, cache) -> Place:
    return Place(request.param, servers.get(request.param), tmp_path / request.node.name[:12])


on_stores = pytest.mark.parametrize("place", STORES, indirect=True)


def likes():
    trees = zip(("params", "opt_state"), state(0), strict=True)
    return {
        f"like_{name}": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        for name, tree in trees
    }


def save(workdir, step: int, **options) -> None:
    params, opt_state = state(step)
    workdir.save(
        step, params=params, opt_state=opt_state, data_state={"next": 10 * step}, **options
    )


def same(a, b) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def test_what_was_saved_comes_back(place):
    with mirrored(place.path) as mirror, open_workdir(mirror, keep=2, keep_every=4) as workdir:
        assert workdir.latest_step() is None
        saved = []
        workdir.on_saved = saved.append
        for step in (3, 4, 5, 6):
            save(workdir, step)
            (mirror.path / "metrics.jsonl").write_text(f"{step}\n")
        workdir.wait()
        assert saved == [3, 4, 5, 6]
        assert complete_steps(place.path) == [4, 5, 6]
    assert place.files()["metrics.jsonl"] == b"6\n"
    with mirrored(place.path) as mirror, open_workdir(mirror, keep=2, keep_every=4) as workdir:
        assert (mirror.path / "metrics.jsonl").read_text() == "6\n"
        step, params, opt_state, data_state = workdir.restore(**likes())
        assert (step, data_state) == (6, {"next": 60})
        assert same((params, opt_state), state(6))
        assert same(workdir.restore(4, **likes())[1], state(4)[0])


def test_an_upload_that_did_not_end_is_no_checkpoint(place, capsys):
    with mirrored(place.path) as mirror, open_workdir(mirror, keep=9, keep_every=None) as workdir:
        save(workdir, 1)
        save(workdir, 2)
    place.write(f"checkpoints/2/{MARKER}", None)
    with mirrored(place.path) as mirror, open_workdir(mirror, keep=9, keep_every=None) as workdir:
        assert workdir.restore(**likes())[0] == 1
        save(workdir, 2, wait=True)
        assert workdir.latest_step() == 2
    name = "checkpoints/2/data/metadata"
    place.write(name, place.files()[name].replace(b"20", b"21"))
    with mirrored(place.path) as mirror, open_workdir(mirror, keep=9, keep_every=None) as workdir:
        assert workdir.restore(**likes())[0] == 1
    assert "data/metadata is damaged" in capsys.readouterr().err
    assert any(name.startswith("checkpoints/2.incomplete") for name in place.files())


@on_stores  # test_workdir.py has full disks
def test_a_store_that_refuses_is_reported_and_harms_nothing(place):
    told: list[str] = []
    with mirrored(place.path) as mirror, open_workdir(mirror, keep=2, keep_every=None) as workdir:
        workdir.on_error = told.append
        save(workdir, 1, wait=True)
        place.store.refused = r"/2/params"
        save(workdir, 2, wait=True)
        place.store.refused = None
        save(workdir, 3, wait=True)
        assert complete_steps(place.path) == [1, 3]
    assert len(told) == 1
    assert told[0].startswith(f"checkpoint 2 could not be saved in {place.path}/checkpoints: ")
    assert "the newest checkpoint is 1" in told[0] and "\n" not in told[0]


@on_stores  # local workdirs have a lock
def test_the_run_that_starts_last_owns_the_workdir(place):
    with mirrored(place.path) as first, open_workdir(first, keep=2, keep_every=None) as workdir:
        save(workdir, 1, wait=True)
        with mirrored(place.path) as second:
            second.own()
        save(workdir, 2)
        with pytest.raises(UserError, match=r"another run .* has taken over .* this one stops"):
            workdir.wait()
    assert complete_steps(place.path) == [1]
    assert json.loads(place.files()[OWNER])["run"]


def test_models(place, tmp_path):
    """A converted model and a workdir are read by loading and by conversion."""
    source = write_source(tmp_path / "hf")
    to_jax.convert(source, tmp_path / "model")
    for file in (tmp_path / "model").rglob("*"):
        if file.is_file():
            place.write(file.relative_to(tmp_path / "model").as_posix(), file.read_bytes())
    model = read_model_dir(place.path)
    assert model.config == MICRO and model.step is None
    assert same(load_params(model.params), load_params(tmp_path / "model" / "params"))
    to_hf.convert(place.path, tmp_path / "back")
    kept = {k: v for k, v in read_all(source).items() if "attn_pool" not in k}
    assert read_all(tmp_path / "back") == kept
    if place.store is not None:
        name = next(name for name in place.files() if name.startswith("params/") and "/d/" in name)
        content = bytearray(place.files()[name])
        content[len(content) // 2] ^= 1
        place.write(name, bytes(content))
        with pytest.raises(CheckpointError, match=f"{name} is damaged; convert it again"):
            read_model_dir(place.path)


def test_a_workdir_is_a_model(place, tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("tokenizer.json", "processor_config.json"):
        (tmp_path / "files" / name).write_text("{}")
    with mirrored(place.path) as mirror, open_workdir(mirror, keep=9, keep_every=None) as workdir:
        lineage.prepare(mirror.path, MICRO, tmp_path / "files")
        save(workdir, 1)
        save(workdir, 2)
    assert read_model_dir(place.path).step == 2
    model = read_model_dir(place.path / "checkpoints" / "1")
    assert (model.step, model.config) == (1, MICRO)
    assert same(load_params(model.params), state(1)[0])


ROW = {"image": "a b.png", "conversations": [{"from": "human", "value": "<image>"}]}
ROW["conversations"].append({"from": "gpt", "value": "b"})


def test_data(place, tmp_path):
    PIL.Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    place.write("train/a b.png", (tmp_path / "a.png").read_bytes())
    place.write("train/rows.json", json.dumps([ROW]).encode())
    place.write("train/more.jsonl", b"\n".join([json.dumps(ROW).encode()] * 2))
    place.write("train/._more.jsonl", b"\0\1")
    assert len(open_source(place.path / "train" / "more.jsonl")) == 2
    assert len(open_source(f"{place.path}/train/*.json")) == 1
    for _ in range(2):  # the second time from the cache
        rows = open_source(str(place.path / "train"))
        assert len(rows) == 3
        assert load_image(rows[0].images[0]).size == (3, 2)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    root = open_source(place.path / "train" / "rows.json", images_root=place.path / "train")
    assert load_image(root[0].images[0]).size == (3, 2)
    with pytest.raises(UserError, match=r"no such file|no data file there"):
        open_source(place.path / "gone.json")
    with pytest.raises(UserError, match="unknown kind of data file"):
        open_source(place.path / "train" / "a b.png")


def test_what_is_not_there(place):
    if place.store is not None:
        with pytest.raises(CheckpointError, match=r"is not a vl2jax checkpoint: it has no model"):
            read_model_dir(place.path)
