"""Fixtures shared by all tests."""

import os
import pathlib
import signal

# Set before jax is imported: eight CPU devices, so that meshes can be tested on any machine.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest
from golden import DATA, Mini, carried

import vl2jax
from convert import to_jax
from vl2jax.common.json_file import read_object
from vl2jax.config import VL2Config
from vl2jax.processing.processor import Processor

ROOT = pathlib.Path(__file__).parent.parent


def _find_reference() -> pathlib.Path | None:
    """Finds the full reference data: VL2JAX_REFERENCE ("off": none), or next to the checkout."""
    setting = os.environ.get("VL2JAX_REFERENCE")
    if setting == "off":
        return None
    path = pathlib.Path(setting or ROOT.parent / "shared" / "reference")
    if setting and not (path / "mini-small").is_dir():
        raise pytest.UsageError(f"VL2JAX_REFERENCE: no reference data at {path}")
    return path if path.is_dir() else None


REFERENCE = _find_reference()
SEES_REFERENCE = pytest.StashKey[bool]()

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# The slowest files run first, so that no worker gets a slow file last.
LONGEST = ("test_train.py", "test_mesh.py", "test_train_step.py", "test_eval.py")

# Background jobs of a shell ignore SIGINT, those of nohup SIGHUP, and so would the processes that
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# A test that needs more data than tests/fixtures contains must have the mark `reference`.  The
# fixture `reference` and the parameters of `golden.minis` add the mark; other tests add it
# themselves.  For a test without the mark, the fixtures below give only the data in tests/fixtures,
# even if the full data is available, so that such a test passes in a fresh clone, too.


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks tests that use the fixture `reference`; skips marked tests without the data."""
    if "reference" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.reference)
    if REFERENCE is None and item.get_closest_marker("reference"):
        reason = "needs the full reference data, which is not next to this checkout"
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Stores whether the test has the mark, for fixtures with a wider scope."""
    item.config.stash[SEES_REFERENCE] = item.get_closest_marker("reference") is not None


def _check_mark(config: pytest.Config, what: str) -> None:
    if not config.stash[SEES_REFERENCE]:
        pytest.fail(f"tests/fixtures has no {what}: mark this test with pytest.mark.reference")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the files in `LONGEST` first; the order within a file does not change."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def quick_compilation():
    """Halves the compilation time; programs run slower, because LLVM does not optimise them.

    For tests whose programs run once and briefly.  Parity with the original (values, tokens, and
    the gradients in `test_train_step.py`) is tested with the default optimizations.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """tests/fixtures, the part of the reference data that is in the repository."""
    return DATA


@pytest.fixture(scope="session")
def processor(data_dir) -> Processor:
    """The processor of mini-small; a file whose tests need another one defines its own."""
    folder = data_dir / "mini-small"
    return Processor.from_dir(folder, VL2Config.from_hf(read_object(folder / "config.json")))


@pytest.fixture(scope="session")
def reference(request) -> pathlib.Path:
    """The full reference data; a test that uses it indirectly must have the mark."""
    _check_mark(request.config, "full reference data")
    return REFERENCE


@pytest.fixture(scope="session")
def mini(request, tmp_path_factory):
    """`mini(name, case)`: a mini checkpoint with this golden case, converted and loaded once.

    Only tests with the mark `reference` can use data that is not in tests/fixtures.
    """
    loaded: dict[pathlib.Path, Mini] = {}

    def get(name: str, case: str | None = None) -> Mini:
        source = DATA / name
        if not carried(name, case):
            _check_mark(request.config, f"{name} with case {case}" if case else name)
            source = REFERENCE / name
        if source not in loaded:
            target = tmp_path_factory.mktemp("converted") / name
            to_jax.convert(source, target)
            model = vl2jax.load(target)
            loaded[source] = Mini(name, source, model.config, model.params, model.processor)
        return loaded[source]

    return get
