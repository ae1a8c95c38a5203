"""What the laws do not say of `block_scan`: numbers by hand, its doors and its other shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.time import block_scan, linear_scan

methods = pytest.mark.parametrize("method", ["sequential", "associative", "chunked"])
# Ten times the largest gap between the loop in float32 and in float64, 2e-7 of numbers around 1.
TOLERANCE = 2e-6


@functools.partial(jax.jit, static_argnames=("method", "reverse"))
def run(a, b, h0=None, reset=None, *, method="auto", reverse=False):
    return block_scan(a, b, h0, reset=reset, method=method, reverse=reverse)


def inputs(*shape, seed=0):
    batch, time, size, *rest = shape
    rng = np.random.default_rng(seed)
    a = 0.4 * rng.normal(size=(batch, time, size, size, *rest))
    return a.astype(np.float32), rng.normal(size=shape).astype(np.float32)


def test_three_steps_by_hand():
    turn = np.array([[0.0, -1.0], [1.0, 0.0]], np.float32)
    a = np.stack([turn, 2 * turn, turn])[None]
    b = np.array([[[0, 0], [1, 0], [0, 0]]], np.float32)
    h0 = np.array([[1, 2]], np.float32)
    h, last = run(a, b, h0)
    np.testing.assert_array_equal(h, [[[-2, 1], [-1, -4], [4, -1]]])
    np.testing.assert_array_equal(last, [[4, -1]])
    reset = np.array([[False, False, True]])
    np.testing.assert_array_equal(run(a, b, h0, reset)[0], [[[-2, 1], [-1, -4], [0, 0]]])
    np.testing.assert_array_equal(run(a, b, h0, reverse=True)[0], [[[4, -1], [-1, -4], [-2, 1]]])


@methods
@pytest.mark.parametrize("trailing", [(), (2, 3)])
def test_any_trailing_shape(method, trailing):
    a, b = inputs(2, 7, 3, *trailing)
    h, last = run(a, b, method=method)
    want = np.zeros((2, 3, *trailing))
    for t in range(7):
        want = np.einsum("bij...,bj...->bi...", a[:, t].astype(np.float64), want) + b[:, t]
        np.testing.assert_allclose(h[:, t], want, atol=TOLERANCE)
    np.testing.assert_allclose(last, want, atol=TOLERANCE)


@methods
def test_diagonal_matrices_are_a_linear_scan(method):
    a, b = inputs(2, 9, 3)
    diagonal = np.einsum("btii->bti", a)
    want, want_last = linear_scan(diagonal, b)
    h, last = run(diagonal[..., None] * np.eye(3, dtype=np.float32), b, method=method)
    np.testing.assert_allclose(h, want, atol=TOLERANCE)
    np.testing.assert_allclose(last, want_last, atol=TOLERANCE)


@methods
def test_second_derivatives(method):
    a, b = inputs(1, 4, 2)

    def loss(a, method):
        return jnp.sum(jnp.square(block_scan(a, b, method=method)[0]))

    def slope(a, method):
        return jnp.sum(jnp.sin(jax.grad(loss)(a, method)))

    got, want = (jax.jit(jax.grad(slope), static_argnums=1)(a, m) for m in (method, "sequential"))
    np.testing.assert_allclose(got, want, atol=1e-5 * np.max(np.abs(want)))
    step = 1e-2
    one = np.zeros_like(a)
    one[0, 1, 0, 1] = step
    numeric = (slope(a + one, "sequential") - slope(a - one, "sequential")) / (2 * step)
    np.testing.assert_allclose(got[0, 1, 0, 1], numeric, rtol=1e-2)


A, B = inputs(2, 5, 3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"a": A[..., :2]}, r"a must be \(b t m m \.\.\.\) = \(2, 5, 3, 3\), got \(2, 5, 3, 2\)"),
        ({"b": B[0]}, r"a must be \(b t m m \.\.\.\) = \(5, 3\), got|b must be \(b t m"),
        ({"a": A[:, :0], "b": B[:, :0]}, r"with t >= 1, got shape \(2, 0, 3\)"),
        ({"h0": B[:1, 0]}, r"h0 must be \(b m \.\.\.\) = \(2, 3\), got \(1, 3\)"),
        ({"reset": np.zeros((2, 4), bool)}, r"reset must be bool \(b t\) = \(2, 5\), got bool"),
        ({"b": B.astype(np.complex64)}, "must be real floats, got complex64"),
        ({"method": "magic"}, "method must be one of .* got 'magic'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_scan(**{"a": A, "b": B} | arguments)
