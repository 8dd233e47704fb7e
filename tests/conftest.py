"""Fixtures shared by all tests."""

import os
import pathlib
import signal

# Before the first import of jax: eight host devices, so that meshes can be tested anywhere.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest
from golden import DATA, Mini, carried

import vl2jax
from convert import to_jax

ROOT = pathlib.Path(__file__).parent.parent


def _find_reference() -> pathlib.Path | None:
    """The full reference data: beside the checkout or where VL2JAX_REFERENCE says; "off": none."""
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

# Files that take the longest come first, so that no process is left alone with one of them.
LONGEST = ("test_train.py", "test_mesh.py", "test_train_step.py", "test_eval.py")

# A background job of a shell ignores Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A test that needs more data than tests/fixtures has carries the mark `reference`.  The fixture
# `reference` brings the mark, and so does `golden.minis` for parameters; other tests name it.
# To a test without the mark the fixtures below give only what is carried, even where the full data
# lie beside the checkout: what passes there passes for a newcomer.


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what uses the fixture `reference`; where there is no such data, skips all marked."""
    if "reference" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.reference)
    if REFERENCE is None and item.get_closest_marker("reference"):
        reason = "needs the full reference data, which is not beside this checkout"
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remembers whether the test that begins has the mark, for fixtures that serve many."""
    item.config.stash[SEES_REFERENCE] = item.get_closest_marker("reference") is not None


def _check_mark(config: pytest.Config, what: str) -> None:
    if not config.stash[SEES_REFERENCE]:
        pytest.fail(f"tests/fixtures has no {what}: mark this test with pytest.mark.reference")


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
def reference(request) -> pathlib.Path:
    """The full reference data; a test that asks for it by a parameter must have the mark."""
    _check_mark(request.config, "full reference data")
    return REFERENCE


@pytest.fixture(scope="session")
def mini(request, tmp_path_factory):
    """`mini(name, case)`: a mini checkpoint, converted and loaded once, that has this golden case.

    Only tests with the mark `reference` can have more than tests/fixtures has.
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
