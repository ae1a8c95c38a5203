"""Jacobians along a trajectory and the exponent of their product, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.ops.newton import newton_scan, stability
from jaxrec.ops.time import block

RNG = np.random.default_rng(0)


def draw(*shape):
    return (0.8 * RNG.normal(size=shape)).astype(np.float32)


def elementwise(params, h, x):
    return jnp.tanh(x + params[None] * h)


def mixing(params, h, x):
    return jnp.tanh(x + block.apply(params[None], h))


def run(step, params, x, h0, jacobian, reset=None):
    def both(params, x, h0):
        h, _ = newton_scan(step, params, x, h0, jacobian=jacobian, reset=reset, check=False)
        return h, stability(step, params, x, h0, h, jacobian=jacobian, reset=reset)

    h, found = jax.jit(both)(params, x, h0)
    before = np.concatenate([h0[:, None], h[:, :-1]], axis=1)
    if reset is not None:
        before[reset] = 0
    return found, before


@pytest.mark.parametrize("with_resets", [False, True])
def test_a_diagonal_jacobian(with_resets):
    params, x, h0 = draw(5), draw(2, 30, 5), draw(2, 5)
    reset = RNG.random((2, 30)) < 0.2 if with_resets else None
    found, before = run(elementwise, params, x, h0, "diagonal", reset)
    want = params * (1 - np.tanh(x + params * before) ** 2)
    np.testing.assert_allclose(found.largest, np.max(np.abs(want)), rtol=1e-6)
    mean = np.mean(np.log(np.abs(want)), axis=(0, 1))
    np.testing.assert_allclose(found.exponent, np.max(mean), rtol=1e-5)


@pytest.mark.parametrize("kind, size, width", [("block", 2, 3), ("dense", 4, 1)])
def test_exponents_of_products_of_matrices(kind, size, width):
    params, x, h0 = draw(size, size, width), 0.1 * draw(2, 300, size, width), draw(2, size, width)
    found, before = run(mixing, params, x, h0, kind)
    slope = 1 - np.tanh(x + np.einsum("ijn,btjn->btin", params, before)) ** 2
    matrices = slope[:, :, :, None] * params
    np.testing.assert_allclose(found.largest, np.max(np.abs(matrices)), rtol=1e-5)
    # The largest singular value of the product of all grows as any direction does.
    growth = np.zeros((2, width))
    for b in range(2):
        for n in range(width):
            product, total = np.eye(size), 0.0
            for t in range(300):
                product = matrices[b, t, :, :, n] @ product
                norm = np.linalg.norm(product, 2)
                product, total = product / norm, total + np.log(norm)
            growth[b, n] = total / 300
    # One random direction and the largest differ by the logarithm of their angle, over 300 steps.
    np.testing.assert_allclose(found.exponent, np.max(np.mean(growth, axis=0)), atol=0.02)


@pytest.mark.parametrize("gain, sign", [(0.3, -1), (3.0, 1)])
def test_its_sign_tells_what_dies_out_from_what_grows(gain, sign):
    """A linear recurrence grows by the largest eigenvalue."""
    params, x, h0 = gain * draw(6, 6), draw(1, 60, 6), draw(1, 6)
    step = lambda params, h, x: h @ params + x  # noqa: E731
    h = np.zeros_like(x)
    found = stability(step, params, x, h0, h, jacobian="dense")
    radius = np.max(np.abs(np.linalg.eigvals(params)))
    assert np.sign(found.exponent) == sign
    np.testing.assert_allclose(found.exponent, np.log(radius), atol=0.05)


def test_a_state_that_is_forgotten_is_far_below_zero():
    forget = lambda params, h, x: x + 0 * h  # noqa: E731
    x, h0 = draw(1, 4, 3), draw(1, 3)
    for kind in ("diagonal", "dense"):
        found = stability(forget, (), x, h0, x, jacobian=kind)
        assert found.largest == 0
        assert -100 < found.exponent < -50
