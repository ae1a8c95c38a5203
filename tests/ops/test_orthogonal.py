"""Matrices made orthogonal or bounded: that they are, and that gradients pass as they are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops import orthogonal


def draw(size, scale=1.0):
    return (scale * np.random.default_rng(size).normal(size=(5, size, size))).astype(np.float32)


def naive_qr(z):
    """Q of one matrix (j j), as reflections that put -sign(x) |x| in place of each column below."""
    size = len(z)
    q, r = np.eye(size), z.astype(np.float64)
    for i in range(size - 1):
        v = np.zeros(size)
        v[i:] = r[i:, i]
        v[i] += np.copysign(np.linalg.norm(v), v[i])
        mirror = np.eye(size) - 2 * np.outer(v, v) / (v @ v)
        q, r = q @ mirror, mirror @ r
    return q


def naive_bound(z, dy, iterations, singular):
    """z / max(1, size), and what the original takes for its gradient, of one matrix (j j)."""
    z, dy, eye = z.astype(np.float64), dy.astype(np.float64), np.eye(len(z))
    measured = z @ z.T if singular else z
    if np.sum(np.abs(measured - eye)) < 1e-3:
        return z, dy

    def power_iteration(matrix, x):
        for _ in range(iterations):
            x = matrix @ x
            x /= np.linalg.norm(x) + 1e-3
        return x, x @ matrix @ x

    x, end = power_iteration(measured - eye, np.ones(len(z)))
    shift = 1 + min(end, 0)
    x, end = power_iteration(measured - shift * eye, x)
    size = max(end + shift, 1)
    size = np.sqrt(size) if singular else size
    return z / size, dy / size - np.outer(dy @ x, x) / size**2


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


@pytest.mark.parametrize("size", [1, 3, 4])
def test_qr_is_made_of_reflections(size):
    """With signs; and its slope is that of differences in float64."""
    z, direction = draw(size), np.random.default_rng(9).normal(size=(5, size, size))
    weights = np.random.default_rng(8).normal(size=(5, size, size))
    want = np.stack([naive_qr(x) for x in z])
    q, pull = jax.vjp(orthogonal.qr, jnp.asarray(z))
    np.testing.assert_allclose(q, want, atol=1e-5)
    ends = [np.stack([naive_qr(x) for x in z + h * direction]) for h in (1e-5, -1e-5)]
    slope = np.sum(weights * (ends[0] - ends[1]), axis=(1, 2)) / 2e-5
    got = np.sum(np.asarray(pull(jnp.asarray(weights, jnp.float32))[0]) * direction, axis=(1, 2))
    np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_they_are_bounded_as_the_equations_say(singular, size, scale):
    """Of matrices that are not symmetric, whose eigenvalues may be complex."""
    bounded = orthogonal.bounded_singular_value if singular else orthogonal.bounded_eigenvalue
    z = draw(size, scale)
    dy = np.random.default_rng(7).normal(size=z.shape).astype(np.float32)
    for iterations in (1, 4, 8):
        want = [naive_bound(x, d, iterations, singular) for x, d in zip(z, dy, strict=True)]
        got, pull = jax.vjp(lambda z, n=iterations: bounded(z, n), jnp.asarray(z))
        np.testing.assert_allclose(got, np.stack([y for y, _ in want]), rtol=1e-4, atol=1e-5)
        dz = np.stack([dz for _, dz in want])
        np.testing.assert_allclose(pull(jnp.asarray(dy))[0], dz, rtol=1e-4, atol=1e-4)


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
