"""State matrices that remember the past as polynomials, and diagonal ones that resemble them.

All of them belong to x' = A x + B u with every eigenvalue of A in the left half plane. They are
constants of initialisation and therefore NumPy, in float64.

Gu et al., HiPPO (2020), arXiv:2008.07669; Gu et al., S4 (2021), arXiv:2111.00396, section 3;
Gu et al., On the parameterization and initialization of diagonal state space models (2022),
arXiv:2206.11893, section 4.
"""

from typing import NamedTuple

import numpy as np


def legs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Legendre polynomials over the whole past, scaled (HiPPO-LegS).

    A[i, j] = -sqrt((2i + 1)(2j + 1)) below the diagonal, -(i + 1) on it, 0 above; B[i] =
    sqrt(2i + 1).

    Args:
      n: state size, >= 1.

    Returns:
      A (n n) and B (n), per unit of time.
    """
    root = np.sqrt(2 * np.arange(_at_least_one("legs", n)) + 1.0)
    a = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(n) + 1.0)
    return a, root


def legt(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Legendre polynomials over a window of the last unit of time (HiPPO-LegT).

    A[i, j] = -sqrt((2i + 1)(2j + 1)) s with s = 1 on and below the diagonal, (-1)^(i - j) above;
    B[i] = sqrt(2i + 1). For a window of length w divide both by w.

    Args:
      n: state size, >= 1.

    Returns:
      A (n n) and B (n), per unit of time.
    """
    index = np.arange(_at_least_one("legt", n))
    root = np.sqrt(2 * index + 1.0)
    row, column = index[:, None], index[None, :]
    sign = np.where(column > row, (-1.0) ** (row - column), 1.0)
    return -np.outer(root, root) * sign, root


class NormalPlusRankOne(NamedTuple):
    """A = V diag(eigenvalues) V^H - p p^T with a unitary V."""

    eigenvalues: np.ndarray  # complex128 (n), by ascending imaginary part
    vectors: np.ndarray  # complex128 (n n): the columns of V
    low_rank: np.ndarray  # float64 (n): p


def legs_normal_plus_rank_one(n: int) -> NormalPlusRankOne:
    """Splits A of `legs` into a normal matrix and a rank-one correction (S4, theorem 1).

    With p_i = sqrt(i + 1/2), A + p p^T = K - 1/2 for a skew-symmetric K: the eigenvalues come in
    conjugate pairs with real part -1/2, and the first n / 2 of them, the half with negative
    imaginary part, stand for all when n is even.

    Args:
      n: state size, >= 1.
    """
    a, _ = legs(n)
    p = np.sqrt(np.arange(n) + 0.5)
    skew = a + np.outer(p, p) + 0.5 * np.eye(n)
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    return NormalPlusRankOne(-0.5 + 1j * frequencies, vectors, p)


def s4d_lin(n: int) -> np.ndarray:
    """Eigenvalues -1/2 + i pi k, k = 0 ... n/2 - 1: a Fourier basis that fades (S4D-Lin).

    Args:
      n: state size, even; one eigenvalue of each conjugate pair is returned.

    Returns:
      complex128 (n/2), per unit of time.
    """
    return -0.5 + 1j * np.pi * np.arange(_pairs("s4d_lin", n))


def s4d_inv(n: int) -> np.ndarray:
    """Eigenvalues -1/2 + i n/pi (n / (2k + 1) - 1), k = 0 ... n/2 - 1: spaced as those of LegS
    (S4D-Inv).

    Args:
      n: state size, even; one eigenvalue of each conjugate pair is returned.

    Returns:
      complex128 (n/2), per unit of time.
    """
    k = np.arange(_pairs("s4d_inv", n))
    return -0.5 + 1j * n / np.pi * (n / (2 * k + 1) - 1)


def _at_least_one(name: str, n: int) -> int:
    if n < 1:
        raise ValueError(f"{name}: the state size must be >= 1, got {n}.")
    return n


def _pairs(name: str, n: int) -> int:
    if n < 2 or n % 2:
        raise ValueError(
            f"{name}: eigenvalues come in conjugate pairs, so the state size must be even and >= 2,"
            f" got {n}."
        )
    return n // 2
