"""Imports go one way: each module of the library imports only from its left."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "vl2jax"

ORDER = [
    *("errors", "lock", "schema", "config_checks", "config", "batch"),
    *("image", "tokenizer", "prompt", "grounding", "processor_config", "collate", "processor"),
    *("data", "data.row", "data.pictures", "data.boxes", "data.formats", "data.files"),
    *("data.samples", "synthetic.dice", "synthetic.words", "synthetic.phrases"),
    *("synthetic.paint", "synthetic.scene", "synthetic.turns", "synthetic.families_shapes"),
    *("synthetic.families_texts", "synthetic.families_pictures", "synthetic.source", "synthetic"),
    *("synthetic.tokens", "synthetic.__main__"),
    *("data.packing", "data.reading", "data.malformed", "data.pipeline", "data.preview"),
    *("progress", "compiler_options", "ambient", "sharding", "kernels", "quantize", "apart"),
    *("parameter", "layers", "attend_tpu", "attend", "rope"),
    *("vision", "adaptor", "attention", "losses", "chunked_loss", "experts_few"),
    *("experts_gmm", "experts_chunked"),
    *("experts", "expert_parallel", "moe", "decoder"),
    "model",
    *("muon", "optim", "recipe", "run_config", "balance", "train_step"),
    *("buckets", "sampling", "answer", "row", "decode", "pictures", "prefix", "engine"),
    "generate",
    *("store", "checkpoint", "api", "footprint"),
    *("orbax_io", "lineage", "workdir", "report", "tensorboard", "curves", "metrics"),
    *("multihost", "feed", "run_flags", "run_setup", "run_events"),
    *("hlo_text", "hlo", "chips", "kernel_costs", "plan_programs"),
    *("request", "session", "answer_output", "answer_file", "shares", "answer_shares"),
    *("chat", "cli", "sample_flags"),
    "plan",
    *("scoring", "contact_sheet", "side_by_side", "compilation_cache", "__init__"),
]


def _path(module: str) -> pathlib.Path:
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imported(module: str) -> set[str]:
    """Modules of the library that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(_path(module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vl2jax":
            inner = node.module.removeprefix("vl2jax").removeprefix(".")
            names = [f"{inner}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in ORDER else inner for name in names}
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix("vl2jax.") for a in node.names if "vl2jax." in a.name]
            found |= set(names)
    return found


def test_every_module_has_its_place():
    found = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = [".".join(path.parts) for path in found]
    names = [name.removesuffix(".__init__") for name in names]
    assert sorted(ORDER) == sorted(names)


def test_imports_go_one_way():
    for place, module in enumerate(ORDER):
        assert _imported(module) <= set(ORDER[:place]), module
    assert len(_imported("model")) > 3


def test_the_library_does_not_know_its_programs():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                programs = {"convert", "sample", "train", "eval"}
                assert not {name.split(".")[0] for name in names} & programs, path
