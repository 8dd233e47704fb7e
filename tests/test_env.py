"""Information for bug reports, and the version."""

import json
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

import vl2jax
from vl2jax import env
from vl2jax.common import version


def run(*flags: str, **variables: str) -> str:
    command = [sys.executable, "-m", "vl2jax.env", *flags]
    environment = {**env.os.environ, **variables}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert vl2jax.__version__ == project["version"]


@pytest.mark.parametrize("beside", [None, '[project]\nname = "other"\nversion = "9"'])
def test_without_a_source_tree_the_version_is_the_installed_one(tmp_path, monkeypatch, beside):
    package = tmp_path / "vl2jax" / "common"
    package.mkdir(parents=True)
    if beside:
        (tmp_path / "pyproject.toml").write_text(beside)
    monkeypatch.setattr(version, "__file__", str(package / "version.py"))
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: f"{name} 1.2")
    assert version.version() == "vl2jax 1.2"


def test_all_sections_as_json():
    found = json.loads(run("--json", JAX_PLATFORMS="cpu", VL2JAX_REFERENCE="off"))
    assert found["versions"]["vl2jax"] == vl2jax.__version__
    assert set(env.PACKAGES) <= found["versions"].keys()
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory"] > 2**20
    assert [(d["platform"], d["count"]) for d in found["devices"]] == [("cpu", 8)]  # conftest.py
    assert found["environment"]["VL2JAX_REFERENCE"] == "off"
    assert {"JAX_PLATFORMS", "XLA_FLAGS"} <= found["environment"].keys()
    assert "PATH" not in found["environment"]
    assert found["compilation cache"].keys() == {"folder", "files", "bytes"}
    assert found["default dtypes"]["float"] == "float32"
    operations = {row["operation"]: row["implementation"] for row in found["operations"]}
    assert operations["attention"] == "cpu"


def test_a_device_that_cannot_be_initialised_is_one_line():
    text = run(JAX_PLATFORMS="cuda")
    devices = text.split("\n\ndevices\n")[1].split("\n\n")[0]
    assert devices.startswith("  could not be initialised: ") and "\n" not in devices
    assert "operations\n  not known without devices\n" in text
    assert "\ncompilation cache\n" in text


def test_a_device_that_does_not_answer_is_not_waited_for(monkeypatch):
    def hangs(*_, timeout, **__):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert env._ask_devices()["devices"] == (
        "could not be initialised: no answer within 120 seconds"
    )


def test_a_fault_in_the_operations_is_not_hidden(monkeypatch):
    code = "print('{\"devices\": []}', flush=True); raise KeyError('attention')"
    really = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: really([*command[:2], code], **options)
    )
    with pytest.raises(RuntimeError, match="KeyError: 'attention'"):
        env._ask_devices()


def test_written_for_people():
    found = {
        "devices": [{"platform": "gpu", "kind": "H100", "count": 2, "memory": 80e9}],
        "operations": [{"operation": "attention", "implementation": "xla", "reason": "else cpu"}],
        "environment": {},
        "compilation cache": {"folder": "/x", "files": 2, "bytes": 3000},
    }
    assert env.written(found).splitlines() == [
        "devices",
        "  2 x H100 (gpu), 80 GB each",
        "",
        "operations",
        "  attention            xla (else cpu)",
        "",
        "environment",
        "  none",
        "",
        "compilation cache",
        "  folder               /x",
        "  files                2",
        "  bytes                3 kB",
    ]


def test_the_wheel_says_that_it_is_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["vl2jax"] == ["py.typed"]
    assert (ROOT / "vl2jax" / "py.typed").is_file()
