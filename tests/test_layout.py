"""Imports go one way: each module of the library imports only from its left."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "vl2jax"

ORDER = [
    *("errors", "schema", "config_checks", "config", "batch"),
    *("image", "tokenizer", "prompt", "grounding", "processor_config", "collate", "processor"),
    *("progress", "layers", "attend", "rope"),
    *("vision", "adaptor", "attention", "losses", "experts", "moe", "decoder", "model"),
    *("sampling", "answer", "decode", "generate"),
    *("store", "checkpoint", "sharding", "api"),
    *("request", "session", "answer_output", "answer_file", "chat", "sample_flags", "__init__"),
]


def _imported(module: str) -> set[str]:
    """Modules of the library that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "vl2jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vl2jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("vl2jax.")}
    return found


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_imports_go_one_way():
    for place, module in enumerate(ORDER):
        assert _imported(module) <= set(ORDER[:place]), module
    assert len(_imported("model")) > 3


def test_the_library_does_not_know_its_programs():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                assert not {name.split(".")[0] for name in names} & {"convert", "sample"}, path
