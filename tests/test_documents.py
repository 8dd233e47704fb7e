"""The generated parts of README and docs are up to date, and their paths and links exist."""

import pathlib
import re

import demo_spread
import plan_table
import pytest
import readme_tables
from conftest import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "results.md"]
README = (ROOT / "README.md").read_text()
SCALING = (ROOT / "docs" / "scaling.md").read_text()


def test_tables_counted_from_shapes():
    """`python benchmarks/readme_tables.py --write` changes nothing."""
    found = readme_tables.between_marks(README, "parameters")
    assert found == readme_tables.parameters_table()
    assert readme_tables.between_marks(README, "memory") == readme_tables.memory_table()


@pytest.fixture(scope="module")
def plans():
    """The recorded results of `benchmarks/plan_table.py`, by table."""
    known = plan_table.known()
    return {
        name: [known[key] for flags in group if (key := " ".join(flags)) in known]
        for name, group in plan_table.cases().items()
    }


def test_tables_of_plans(plans):
    """`python benchmarks/plan_table.py --write` changes nothing."""
    between = readme_tables.between_marks
    best = plan_table.train_table(plans["train"], best_only=True)
    assert between(README, "plan: train") == best
    assert between(README, "plan: sample") == plan_table.sample_table(plans["sample"])
    every = plan_table.train_table(plans["train"], best_only=False)
    assert between(SCALING, "plan: train") == every
    assert between(SCALING, "plan: width") == plan_table.width_table(plans["width"])
    assert between(SCALING, "plan: chips") == plan_table.chips_table(plans["chips"])


def test_scores_of_the_demo():
    """The text about the demo is that of the recorded runs."""
    assert readme_tables.between_marks(README, "demo") == demo_spread.sentence(demo_spread.kept())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_links_lead_somewhere(path):
    """Links and paths of the repository in a document exist."""
    text = path.read_text()
    links = re.findall(r"\]\(([^)#\s]+)\)|(?:src|href)=\"([^\"#]+)\"", text)
    for link in filter(None, (a or b for a, b in links)):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    roots = ("vl2jax", "tests", "convert", "configs", "benchmarks", "docs", "examples")
    for name in re.findall(rf"`((?:{'|'.join(roots)})/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_modules_that_documents_run_exist():
    for path in DOCUMENTS:
        for name in re.findall(r"python3? -m ((?:vl2jax|convert)[\w.]*)", path.read_text()):
            module = ROOT / pathlib.Path(*name.split("."))
            runs = module.with_suffix(".py").exists() or (module / "__main__.py").exists()
            assert runs, f"{path.name}: python -m {name}"
