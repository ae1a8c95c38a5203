"""Matrices made orthogonal or bounded: that they are, and that gradients pass as they are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import orthogonal


def draw(size, scale=1.0):
    return (scale * np.random.default_rng(size).normal(size=(5, size, size))).astype(np.float32)


@pytest.mark.parametrize("form", ["exponential", "householder", "qr"])
@pytest.mark.parametrize("size", [2, 4])
def test_they_are_orthogonal(form, size):
    q = jax.jit(getattr(orthogonal, form))(draw(size, 0.3))
    products = np.einsum("bij,bkj->bik", q, q)
    # The rows of reflections are short of 1 by 1e-5 over their length, here 0.05 at least.
    allowed = 1e-3 if form == "householder" else 3e-5
    np.testing.assert_allclose(products, np.broadcast_to(np.eye(size), q.shape), atol=allowed)


def test_the_exponential_is_its_series():
    z = draw(3, 0.5).astype(np.float64)
    skew = 0.7 * (z - np.swapaxes(z, 1, 2))
    want, term = np.zeros_like(z), np.broadcast_to(np.eye(3), z.shape)
    for i in range(5):
        want, term = want + term, skew @ term / (i + 1)
    got = orthogonal.exponential(z.astype(np.float32), factor=0.7, order=5)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_reflections_are_in_the_order_of_rows():
    z = draw(2)
    v = z / np.linalg.norm(z, axis=-1, keepdims=True)
    mirrors = np.eye(2) - 2 * v[..., :, None] * v[..., None, :]
    want = -mirrors[:, 0] @ mirrors[:, 1]
    np.testing.assert_allclose(orthogonal.householder(z), want, atol=1e-4)


def test_other_numbers_of_reflections_are_refused():
    with pytest.raises(ValueError, match=r"must have 2\^n rows, got \(5, 3, 3\)"):
        orthogonal.householder(jnp.zeros((5, 3, 3)))


@pytest.mark.parametrize("singular", [False, True])
def test_large_matrices_are_divided_by_their_largest_value(singular):
    bounded = orthogonal.bounded_singular_value if singular else orthogonal.bounded_eigenvalue
    z = draw(3)
    z = z @ np.swapaxes(z, 1, 2) + np.float32(2) * np.eye(3, dtype=np.float32)
    got = bounded(z, 40)
    # The vector's length, and with it the estimate, is short of 1 by 1e-3 over the step's length.
    largest = np.max(np.abs(np.linalg.eigvals(np.asarray(got))), axis=-1)
    np.testing.assert_allclose(largest, 1, atol=5e-3)
    small = np.float32(0.5) * np.eye(3, dtype=np.float32)[None]
    np.testing.assert_allclose(bounded(small, 8), small, atol=1e-6)


@pytest.mark.parametrize("singular", [False, True])
def test_the_identity_passes_with_its_gradient(singular):
    bounded = orthogonal.bounded_singular_value if singular else orthogonal.bounded_eigenvalue
    eye = jnp.eye(3)[None]
    weights = jnp.arange(9.0).reshape(1, 3, 3)
    y, gradient = jax.value_and_grad(lambda z: jnp.sum(weights * bounded(z, 8)))(eye)
    assert y == 12
    np.testing.assert_array_equal(gradient, weights)


def test_the_gradient_takes_the_vector_for_a_constant():
    """Exact would be dZ / s - (v^T dZ v) Z / s^2; the original has (dZ v) v^T for the second."""
    z = np.diag([3.0, 1.0]).astype(np.float32)[None]
    weights = np.array([[[1.0, 2.0], [3.0, 4.0]]], np.float32)
    gradient = jax.grad(lambda z: jnp.sum(weights * orthogonal.bounded_eigenvalue(z, 30)))(z)
    v = np.array([[1.0], [0.0]])
    want = weights[0] / 3 - weights[0] @ v @ v.T / 9
    np.testing.assert_allclose(gradient[0], want, atol=2e-3)
