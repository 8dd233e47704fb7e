"""The layout of the library: one import order, no circular imports, platforms only in `ops`."""

import ast
import pathlib
import re
from graphlib import TopologicalSorter

from conftest import ROOT

PACKAGE = ROOT / "vl2jax"
# Each package imports only from those before it.
ORDER = (
    *("common", "config", "processing", "data", "synthetic", "parallel", "ops", "model"),
    *("checkpoints", "inference", "training", "evaluation", "cli", "plan", "programs"),
)
PROGRAMS = ("env",)  # single modules, which may import all packages
# Only `ops` may ask for the platform, and `parallel.processes`, which initialises processes.
PLATFORM = re.compile(r"\bon_(cpu|tpu|gpu)\b|\bdefault_backend\b|\bplatform\(\)")


def _modules() -> dict[str, set[str]]:
    """All modules of the library, and the modules that each imports, also inside functions."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    return {name: _imported(path) & paths.keys() for name, path in paths.items()}


def _parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text())


def _imported(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def _package(module: str) -> str:
    return [*module.split("."), ""][1]


def _is_room(module: str) -> bool:
    """Whether a module belongs to its package; `__main__` is a program, which may import all."""
    return not module.endswith(".__main__")


def test_packages_import_one_way():
    for module, imported in _modules().items():
        if _package(module) and _is_room(module):
            order = ORDER + PROGRAMS
            place = order.index(_package(module))
            later = {other for other in imported if _package(other) in order[place + 1 :]}
            assert not later, f"{module} imports {later}"


def test_no_circles():
    modules = _modules()
    # `__init__.py` only re-exports names, so importing a module of its package is no dependency.
    faces = {name for name in modules if any(other.startswith(f"{name}.") for other in modules)}
    order = {name: deps - faces for name, deps in modules.items() if name not in faces}
    assert len(list(TopologicalSorter(order).static_order())) > 80


def test_only_ops_knows_platforms():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE)
        if room.parts[0] != "ops" and room.as_posix() != "parallel/processes.py":
            found = PLATFORM.search(path.read_text())
            assert not found, f"{room}: {found.group()}"


def test_every_package_says_what_it_is_for():
    """The docstring says what a package is for, what it imports, and where to start reading."""
    modules = _modules()
    for place, name in enumerate(ORDER):
        text = " ".join(ast.get_docstring(_parsed(PACKAGE / name / "__init__.py")).split())
        assert "Start with `" in text and "mports" in text, name
        imported = set().union(
            *(
                deps
                for module, deps in modules.items()
                if _package(module) == name and _is_room(module)
            )
        )
        others = {_package(module) for module in imported} - {name, ""}
        named = set(re.findall(r"`(\w+)`", text)) & set(ORDER) - {name}
        if "mports everything" not in text:
            assert named == others, f"{name} names {named}, imports {others}"
        for other in others:
            assert f"`{other}`" in text or "mports everything" in text, f"{name}: {other}"
            assert ORDER.index(other) < place


def test_the_library_does_not_know_the_converter():
    for path in PACKAGE.rglob("*.py"):
        tops = {name.split(".")[0] for name in _imported(path)}
        assert "convert" not in tops, path
