"""The matrices that remember, against what defines them."""

import numpy as np
import pytest

from jaxrec.ops import hippo

SIZES = [1, 2, 5, 8, 16]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("make", [hippo.legs, hippo.legt])
def test_a_constant_is_remembered_as_the_constant_polynomial(make, n):
    """x' = A x + B u comes to rest, for u = 1, at the coefficients of 1 in Legendre polynomials."""
    a, b = make(n)
    assert a.dtype == b.dtype == np.float64
    assert np.max(np.linalg.eigvals(a).real) < 0
    np.testing.assert_allclose(-np.linalg.solve(a, b), np.eye(n)[0], atol=1e-9)


def test_legs_by_hand():
    a, b = hippo.legs(3)
    np.testing.assert_allclose(
        a, [[-1, 0, 0], [-(3**0.5), -2, 0], [-(5**0.5), -(15**0.5), -3]], rtol=1e-15
    )
    np.testing.assert_allclose(b, [1, 3**0.5, 5**0.5], rtol=1e-15)


def test_legt_delays_by_its_window():
    """The polynomial at the end of the window is the input one unit of time ago: a ramp lags by
    one.
    """
    n = 12
    a, _ = hippo.legt(n)
    # For u = t the state tends to x = r + t e_0 with A r = e_0: A (r + t e_0) + B t = e_0.
    r = np.linalg.solve(a, np.eye(n)[0])
    at_the_end = np.sqrt(2 * np.arange(n) + 1.0) * (-1.0) ** np.arange(n)
    assert at_the_end @ r == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("n", SIZES)
def test_legs_is_normal_plus_rank_one(n):
    a, _ = hippo.legs(n)
    eigenvalues, vectors, p = hippo.legs_normal_plus_rank_one(n)
    np.testing.assert_allclose(vectors @ vectors.conj().T, np.eye(n), atol=1e-12)
    normal = vectors @ np.diag(eigenvalues) @ vectors.conj().T
    np.testing.assert_allclose(normal - np.outer(p, p), a, atol=1e-10)
    np.testing.assert_array_equal(eigenvalues.real, -0.5)
    assert np.all(np.diff(eigenvalues.imag) > 0)
    np.testing.assert_allclose(eigenvalues.imag, -eigenvalues.imag[::-1], atol=1e-10)


def test_diagonal_eigenvalues_by_hand():
    np.testing.assert_allclose(hippo.s4d_lin(6), -0.5 + np.pi * np.array([0j, 1j, 2j]))
    np.testing.assert_allclose(
        hippo.s4d_inv(6), -0.5 + 6 / np.pi * 1j * np.array([5, 1, 1 / 5]), rtol=1e-12
    )


@pytest.mark.parametrize("n", [16, 64])
def test_s4d_inv_follows_legs(n):
    """The largest frequency of LegS is about that of S4D-Inv (arXiv:2206.11893, section 4.3)."""
    exact = np.abs(hippo.legs_normal_plus_rank_one(n).eigenvalues.imag).max()
    assert hippo.s4d_inv(n).imag.max() == pytest.approx(exact, rel=0.1)


def test_sizes_that_do_not_work_are_refused():
    with pytest.raises(ValueError, match=r"legs: the state size must be >= 1, got 0"):
        hippo.legs(0)
    with pytest.raises(ValueError, match=r"s4d_lin: .* must be even and >= 2, got 3"):
        hippo.s4d_lin(3)
