"""Comparisons for tests that say where and how much two arrays differ."""

from typing import Any

import numpy as np


def assert_close(
    got: Any, expected: Any, *, atol: float = 0.0, rtol: float = 0.0, name: str = "array"
) -> None:
    """Asserts |got - expected| <= atol + rtol * max|expected| for every element.

    The relative part refers to the largest expected element: rounding in a sum is relative to its
    terms, so an element that happens to cancel is as uncertain as its neighbours.

    Raises:
      AssertionError: shapes differ, something is not finite, or an element is too far off; the
        message gives the worst pair, its index, how many are too far off, and the relative L2
        distance.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    if got.size == 0:
        return
    wide = np.result_type(got.dtype, expected.dtype, np.float64)
    got, expected = got.astype(wide), expected.astype(wide)
    for what, x in (("", got), (" expected", expected)):
        assert np.isfinite(x).all(), (
            f"{name}: {np.sum(~np.isfinite(x))} of {x.size}{what} are not finite"
        )
    error = np.abs(got - expected)
    allowed = atol + rtol * np.max(np.abs(expected))
    if np.max(error) <= allowed:
        return
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    norm = np.linalg.norm(expected.ravel())
    distance = np.linalg.norm(error.ravel()) / norm if norm else np.inf
    raise AssertionError(
        f"{name}: {np.sum(error > allowed)} of {error.size} differ by more than {allowed:.2e};"
        f" worst at {worst}: {got[worst]} instead of {expected[worst]}, off by {error[worst]:.2e};"
        f" relative L2 {distance:.2e}"
    )
