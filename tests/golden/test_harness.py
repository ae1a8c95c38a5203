"""What the harness allows, and what it does where there is no case."""

import json

import numpy as np
import pytest

from tests.golden.harness import Case


def case_with(folder, readme, **arrays):
    """A case that holds these arrays."""
    (folder / "config.json").write_text(json.dumps({}))
    (folder / "README.md").write_text(readme)
    np.savez(folder / "cases.npz", **arrays)
    return Case(folder)


def allows(case, error, **options):
    """Whether a value of 1 may be off by this much."""
    try:
        case.check("y", np.array([1 + error]), **options)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    "readme, allowed",
    [
        ("float32-vs-float64 y: 3.0e-06", 3e-5),
        ("float32-vs-float64 y: 3.0e-04", 1e-4),  # never more
        ("float32-vs-float64 y: 0.0e+00", 10 * 2**-23),  # equal after rounding is no zero
        ("float32-vs-float64 y: 0.0e+00. About 4.0e-06 relative is its floor.", 4e-5),
        ("", 1e-5),
    ],
)
def test_the_tolerance_is_ten_gaps(tmp_path, readme, allowed):
    case = case_with(tmp_path, readme, y=np.ones(1, np.float32))
    assert allows(case, 0.99 * allowed) and not allows(case, 1.01 * allowed)


@pytest.mark.parametrize("gap, allowed", [("1.0e-08", 1e-5), ("3.0e-06", 3e-5)])
def test_a_gap_of_other_arrays_never_allows_less_than_no_gap(tmp_path, gap, allowed):
    case = case_with(tmp_path, f"float32-vs-float64 z: {gap}", y=np.ones(1, np.float32))
    options = {"gap_is_of_others": True}
    assert allows(case, 0.99 * allowed, **options)
    assert not allows(case, 1.01 * allowed, **options)


def test_a_known_difference_comes_on_top_as_it_may_have_been_rounded(tmp_path):
    readme = "reference cached-vs-full difference 4.9e-02; float32-vs-float64 y: 1.0e-06"
    case = case_with(tmp_path, readme, y=np.ones(1, np.float32))
    options = {"known_difference": case.cached_gap}
    assert allows(case, 0.0495, **options) and not allows(case, 0.0496, **options)


def test_an_array_that_nobody_looked_at_is_named(tmp_path):
    case = case_with(tmp_path, "", y=np.ones(1), z=np.ones(1))
    assert allows(case, 0)
    with pytest.raises(AssertionError, match="nobody looked at"):
        case.assert_all_looked_at()


def test_a_field_that_nobody_knows_is_named(tmp_path):
    case = case_with(tmp_path, "")
    case.config = {"N": 3, "M": 2}
    case.check_fields("L", "M", "N")
    with pytest.raises(AssertionError, match=r"unknown fields \['M'\]"):
        case.check_fields("N")


@pytest.mark.parametrize("folder", [])
def test_of_no_case(folder):
    """Is not run, nor skipped; see the next."""
    raise AssertionError


def test_no_case_is_no_test(request):
    names = [item.name for item in request.session.items if item.path == request.path]
    assert request.node.name in names
    assert not any(name.startswith(test_of_no_case.__name__) for name in names)
