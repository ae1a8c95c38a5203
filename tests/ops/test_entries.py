"""Products with entries first are those of matrices, and so are their gradients."""

import jax
import numpy as np

from jaxrec.ops import entries


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_they_are_products_of_matrices():
    a, b = draw(5, 3, 2, 4), draw(5, 3, 4, 6)
    dy = draw(5, 3, 2, 6)

    def product(a, b):
        return entries.last(entries.product(entries.first(a), entries.first(b)))

    got, backward = jax.vjp(product, a, b)
    da, db = backward(dy)
    np.testing.assert_allclose(got, a @ b, atol=1e-5)
    np.testing.assert_allclose(da, dy @ np.swapaxes(b, -1, -2), atol=1e-5)
    np.testing.assert_allclose(db, np.swapaxes(a, -1, -2) @ dy, atol=1e-5)
