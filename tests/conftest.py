"""Fixtures shared by all tests."""

import os
import pathlib
import signal

# Before the first import of jax: eight host devices, so that meshes can be tested anywhere.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest
from golden import Mini

import vl2jax
from convert import to_jax

ROOT = pathlib.Path(__file__).parent.parent
DATA = ROOT / "tests" / "fixtures"
REFERENCE = ROOT.parent / "shared" / "reference"
NO_REFERENCE = "the full reference data is not beside this checkout"

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Files that take the longest come first, so that no process is left alone with one of them.
LONGEST = ("test_train.py", "test_mesh.py", "test_train_step.py", "test_eval.py")

# A background job of a shell ignores Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files, see `LONGEST`; within a file nothing moves."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def quick_compilation():
    """Programs are compiled in half the time and run slower: XLA optimises, LLVM does not.

    For tests whose programs run once and briefly.  Values, tokens and two models' gradients of the
    original (`test_train_step.py`) are checked as users have them compiled.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The small part of the reference data that the project carries."""
    return DATA


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
    """The full reference data, where it lies beside the checkout."""
    if not REFERENCE.is_dir():
        pytest.skip(NO_REFERENCE)
    return REFERENCE


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """`mini(name)`: a mini checkpoint, converted and loaded once; skips where it is not."""
    loaded: dict[str, Mini] = {}

    def get(name: str, case: str | None = None) -> Mini:
        source = next((d / name for d in (REFERENCE, DATA) if (d / name).is_dir()), None)
        if source is None:
            pytest.skip(NO_REFERENCE)
        if name not in loaded:
            target = tmp_path_factory.mktemp("converted") / name
            to_jax.convert(source, target)
            model = vl2jax.load(target)
            loaded[name] = Mini(name, source, model.config, model.params, model.processor)
        if case is not None and not loaded[name].has(case):
            pytest.skip(NO_REFERENCE)
        return loaded[name]

    return get
