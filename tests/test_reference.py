"""Only tests with the mark `reference` can use the full reference data."""

import pytest
from golden import MINIS, carried, minis


def test_without_the_mark_only_carried_data_are_seen(mini):
    """Even if the full data is available, so that unmarked tests pass in a fresh clone."""
    assert carried("mini-small", "one_image") and mini("mini-small", "one_image").has("one_image")
    for name, case in (("mini-base", None), ("mini-small", "three_images")):
        with pytest.raises(pytest.fail.Exception, match=f"{name}.*: mark this test with"):
            mini(name, case)


def test_parameters_that_are_not_carried_have_the_mark():
    marked = {param.values[0]: bool(param.marks) for param in minis()}
    assert marked == {name: name not in ("mini-small", "mini-extra") for name in MINIS}
    (here,) = minis(["mini-small"], ["train"])
    assert (here.values, here.marks) == (("mini-small", "train"), ())


def test_the_fixture_brings_the_mark(request, reference):
    assert request.node.get_closest_marker("reference") and (reference / "mini-base").is_dir()
