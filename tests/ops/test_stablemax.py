"""Stablemax against its definition in float64, far from zero too."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.ops.stablemax import log_stablemax


def test_it_is_the_logarithm_of_its_definition():
    x = np.random.default_rng(0).normal(scale=3.0, size=(4, 7))
    s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
    want = np.log(s / np.sum(s, axis=-1, keepdims=True))
    np.testing.assert_allclose(log_stablemax(jnp.asarray(x, jnp.float32)), want, rtol=1e-5)


def test_values_and_gradients_are_finite_far_from_zero():
    x = jnp.array([[-1e30, 1e30, 0.0], [-1e30, -1e30, -1e30]])
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(log_stablemax(x)))(x)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    np.testing.assert_allclose(log_stablemax(x)[1], -np.log(3), rtol=1e-5)


def test_the_gradient_at_zero_is_that_of_both_sides():
    x = jnp.zeros((1, 2))
    gradient = jax.jacobian(log_stablemax)(x)[0, :, 0]
    np.testing.assert_allclose(gradient, [[0.5, -0.5], [-0.5, 0.5]], atol=1e-6)
