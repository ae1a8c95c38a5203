"""Feature maps: what their products are, and that they stay positive."""

import jax
import numpy as np

from jaxrec.ops import feature_maps


def test_products_are_the_exponential_to_second_order():
    rng = np.random.default_rng(0)
    q, k = (2 * rng.normal(size=(2, 50, 6))).astype(np.float32)
    phi = jax.jit(feature_maps.taylor)
    got = np.sum(np.asarray(phi(q), np.float64) * np.asarray(phi(k), np.float64), axis=-1)
    s = np.sum(q.astype(np.float64) * k, axis=-1) / 6**0.5
    np.testing.assert_allclose(got, 1 + s + s**2 / 2, rtol=2e-6)  # measured: 2e-7
    assert got.min() >= 0.5
    assert phi(q.astype(jax.numpy.bfloat16)).dtype == np.float32
