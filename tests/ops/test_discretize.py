"""Discretisation against NumPy in float64, near zero, and at the edge of stability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import hippo
from jaxrec.ops.discretize import (
    discretize_diagonal,
    generalised_bilinear,
    is_stable,
    largest_decay,
)
from jaxrec.testing import assert_close

METHODS = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}


def exact_diagonal(eigenvalues, step, method):
    z = np.asarray(eigenvalues, np.complex128) * np.asarray(step, np.float64)
    if method == "zoh":
        # The mean of exp(z s) over s in [0, 1] by Gauss: no division by z.
        nodes, weights = np.polynomial.legendre.leggauss(40)
        return np.exp(z), step * (np.exp(z[..., None] * (nodes + 1) / 2) @ weights) / 2
    alpha = METHODS[method]
    return (1 + (1 - alpha) * z) / (1 - alpha * z), step / (1 - alpha * z)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 0.3])
def test_dense_matches_numpy(alpha):
    a, b = hippo.legs(6)
    step = np.array([[0.001, 0.1, 1.0], [0.01, 0.5, 0.003]])
    a_bar, b_bar = jax.jit(generalised_bilinear, static_argnums=3)(
        a.astype(np.float32), b.astype(np.float32), step.astype(np.float32), alpha
    )
    for i in np.ndindex(step.shape):
        inverse = np.linalg.inv(np.eye(6) - alpha * step[i] * a)
        assert_close(a_bar[i], inverse @ (np.eye(6) + (1 - alpha) * step[i] * a), rtol=2e-6)
        assert_close(b_bar[i], inverse @ b * step[i], rtol=2e-6)


@pytest.mark.parametrize("method", ["zoh", *METHODS])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_diagonal_matches_numpy(method, dtype):
    eigenvalues = np.array([-3.0, -0.5, -1e-4, -1e-9, 0.0])
    if dtype == np.complex64:
        eigenvalues = eigenvalues + 1j * np.array([5.0, 40.0, 1e-3, 1e-8, 0.0])
    step = np.array([[0.001], [0.1], [0.7]], np.float32)
    got = jax.jit(discretize_diagonal, static_argnums=2)(
        eigenvalues.astype(dtype)[None], step, method
    )
    for left, right in zip(
        got, exact_diagonal(eigenvalues.astype(dtype), step, method), strict=True
    ):
        assert left.dtype == dtype
        np.testing.assert_allclose(left, right, rtol=4e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-6, 1e-3, 0.1, 0.499, 0.501, 2.0])
def test_the_gradient_of_zero_order_hold_is_right_however_small(size):
    """d gain / d lambda = dt^2 times the mean of s exp(z s), which is dt^2 / 2 at zero."""

    def gain(eigenvalue):
        return jnp.real(discretize_diagonal(eigenvalue, jnp.float32(0.5), "zoh")[1])

    got = jax.jit(jax.grad(gain))(jnp.float32(-2 * size))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s = (nodes + 1) / 2
    assert got == pytest.approx(0.25 * np.sum(weights * s * np.exp(-size * s)) / 2, rel=3e-6)


def test_a_gate_is_a_discretisation():
    """Backward Euler of x' = u - x, dt = exp(z): h + sigmoid(z) (u - h) (LSSL, lemma 3.1)."""
    z = np.linspace(-4, 4, 9).astype(np.float32)
    decay, gain = discretize_diagonal(jnp.full(9, -1.0), jnp.exp(z), "backward_euler")
    gate = 1 / (1 + np.exp(-z.astype(np.float64)))
    assert_close(decay, 1 - gate, rtol=1e-6)
    assert_close(gain, gate, rtol=1e-6)


@pytest.mark.parametrize("method", ["zoh", *METHODS])
def test_only_euler_loses_stability(method):
    decay, _ = discretize_diagonal(jnp.array([-0.5 + 40j, -30 + 0j]), jnp.full(2, 0.1), method)
    assert bool(is_stable(decay)) == (method != "euler")


def test_a_dense_system_that_grows_is_reported_and_not_refused():
    a, b = (jnp.asarray(x, jnp.float32) for x in hippo.legs(6))
    euler, _ = generalised_bilinear(a, b, jnp.array([0.01, 1.0]), 0.0)
    bilinear, _ = generalised_bilinear(a, b, jnp.array([0.01, 1.0]), 0.5)
    np.testing.assert_array_equal(is_stable(euler, dense=True), [True, False])
    np.testing.assert_array_equal(is_stable(bilinear, dense=True), [True, True])


def test_the_largest_decay_of_a_matrix_is_its_largest_eigenvalue():
    """Of matrices far from normal too, and of a rotation, which is on the circle."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(x, jnp.float32) for x in hippo.legs(16))
    steps = jnp.array([1e-3, 0.03, 0.5])
    bars = [generalised_bilinear(a, b, steps, alpha)[0] for alpha in (0.0, 0.5)]
    drawn = jnp.asarray(rng.normal(size=(5, 16, 16)), jnp.float32)
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(1, 16, 16)))[0], jnp.float32)
    for matrices in (*bars, drawn, turn):
        wide = np.asarray(matrices, np.float64)
        want = np.max(np.abs(np.linalg.eigvals(wide)), axis=-1)
        got = jax.jit(lambda x: largest_decay(x, dense=True))(matrices)
        # Rounding moves the eigenvalues of LegS as it moves those that NumPy finds in float32.
        np.testing.assert_allclose(got, want, rtol=2e-5)
    assert bool(is_stable(turn, dense=True)[0])
    assert not largest_decay(jnp.zeros((1, 2, 2)), dense=True)[0] > 1e-30
    np.testing.assert_allclose(largest_decay(jnp.array([0.5 + 0.5j, -0.9])), 0.9, rtol=1e-6)


def test_bad_arguments_are_refused():
    a, b = jnp.eye(2), jnp.ones(2)
    with pytest.raises(ValueError, match=r"every step must be > 0, got 0\.0"):
        discretize_diagonal(b, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"every step must be > 0, got -1\.0"):
        generalised_bilinear(a, b, jnp.array(-1.0), 0.5)
    with pytest.raises(ValueError, match=r"method must be one of .*'zoh'.* got 'foh'"):
        discretize_diagonal(b, b, "foh")
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        generalised_bilinear(a, b, b, 2.0)
    with pytest.raises(ValueError, match=r"a must be \(n n\) and b \(n\), got \(2, 2\) and \(3,\)"):
        generalised_bilinear(a, jnp.ones(3), b, 0.5)
