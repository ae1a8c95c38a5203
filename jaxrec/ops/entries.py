"""Products of many small matrices, whose entries come first: (i j ...).

A product of arrays (... i j) is one product for each matrix, which costs far more to begin than to
carry out where a matrix has a few rows. With the entries first it is a few sums of products of
long vectors.
"""

import jax
import jax.numpy as jnp
from jax import Array


def first(x: Array) -> Array:
    """(... i j) to (i j ...)."""
    return jnp.moveaxis(x, (-2, -1), (0, 1))


def last(x: Array) -> Array:
    """(i j ...) to (... i j)."""
    return jnp.moveaxis(x, (0, 1), (-2, -1))


@jax.custom_vjp
def product(a: Array, b: Array) -> Array:
    """The products of matrices a (i r ...) with b (r j ...), (i j ...)."""
    terms = [a[:, r, None] * b[None, r] for r in range(a.shape[1])]
    return sum(terms[1:], start=terms[0])


def _forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(a, b), (a, b)


def _backward(inputs: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """As products: XLA sums over axes of so few entries far more slowly."""
    a, b = inputs
    return product(dy, jnp.swapaxes(b, 0, 1)), product(jnp.swapaxes(a, 0, 1), dy)


product.defvjp(_forward, _backward)
