"""The configurations of the starts of a run, and what changes from one to the next."""

import dataclasses
import json

import pytest
import smallest

from vl2jax.training.config_history import config_changes, record_start
from vl2jax.training.run_config import read_run_config

CONFIG = read_run_config(smallest.get_config().to_dict())


def changed(**fields):
    return dataclasses.replace(CONFIG, **fields)


def names(workdir) -> list[str]:
    return sorted(path.name.split("-")[0] for path in (workdir / "configs").iterdir())


def test_each_start_is_kept_once(tmp_path):
    record_start(tmp_path, CONFIG, 0)
    record_start(tmp_path, CONFIG, 0)  # killed before the first checkpoint
    record_start(tmp_path, CONFIG, 40)
    record_start(tmp_path, changed(steps=900), 120)
    assert names(tmp_path) == ["00000000", "00000040", "00000120"]
    newest = json.loads((tmp_path / "config.json").read_text())
    assert newest["steps"] == 900
    (last,) = (tmp_path / "configs").glob("00000120-*.json")
    assert json.loads(last.read_text()) == newest
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "configs"}


def test_a_configuration_from_before_the_history_is_kept(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3}')
    record_start(tmp_path, CONFIG, 7)
    assert json.loads((tmp_path / "configs" / "00000000-earlier.json").read_text()) == {"steps": 3}
    assert names(tmp_path) == ["00000000", "00000007"]


def test_changes_are_told_field_by_field(tmp_path):
    assert config_changes(tmp_path, CONFIG) == []
    record_start(tmp_path, CONFIG, 0)
    assert config_changes(tmp_path, CONFIG) == []
    optim = dataclasses.replace(CONFIG.optim, lr=0.25, schedule="constant", frozen=("vision",))
    data = dataclasses.replace(CONFIG.data, train="a" * 200 + ".json")
    told = config_changes(tmp_path, changed(steps=12, optim=optim, data=data))
    assert told[:2] == ["steps: 6 -> 12", "optim.lr: 0.001 -> 0.25"]
    assert told[2:4] == ['optim.schedule: "cosine" -> "constant"', 'optim.frozen: [] -> ["vision"]']
    assert told[4].startswith('data.train: "synthetic" -> "aaa') and len(told[4]) < 100
    assert len(told) == 5


@pytest.mark.parametrize("kind", ["older", "newer", "damaged"])
def test_files_of_other_versions(tmp_path, kind):
    """Fields that a file does not have yet are those by default; unknown ones are told."""
    record_start(tmp_path, CONFIG, 0)
    content = json.loads((tmp_path / "config.json").read_text())
    if kind == "older":
        del content["data"]["max_skipped"]
    if kind == "newer":
        content["later"] = 1
    text = json.dumps(content) if kind != "damaged" else "{"
    (tmp_path / "config.json").write_text(text)
    told = config_changes(tmp_path, CONFIG)
    assert told == (["later: 1 -> not set"] if kind == "newer" else [])
    record_start(tmp_path, CONFIG, 0)
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 6
