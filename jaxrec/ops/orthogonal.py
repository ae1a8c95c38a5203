"""Square matrices made orthogonal, or of bounded size, without leaving the graph of gradients.

The first three give orthogonal matrices, the last two divide by an estimate of the largest
eigenvalue or singular value. pLSTM makes the transitions of its states of them: Pöppel et al.
(2025), arXiv:2506.11997, section 4.3 and appendix B.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops import entries

SMALLEST_STEP = 1e-3  # of the power iteration: added to the length by which it divides
SMALLEST_CHANGE = 1e-3  # from the identity, below which a matrix is left as it is
SMALLEST_ROW = 1e-5


def exponential(z: Array, *, factor: float = 1.0, order: int = 16) -> Array:
    """exp(factor (Z - Z^T)) by the first terms of its series, orthogonal up to what they miss.

    With p the root of the order, powers up to A^p are made first, and parts of p terms are then
    nested, S_i = sum_r A^r (ip)! / (ip + r)! + A^p S_{i+1} (ip)! / (ip + p)!: twice p products.

    Args:
      z: (... j j).
      factor: of the skew part.
      order: number of terms, >= 1; enough while the skew part's norm is a few units below it.
    """
    skew = entries.first(factor * (z - jnp.swapaxes(z, -1, -2)))
    each = math.isqrt(order - 1) + 1
    weights = [
        [
            _ratio(begin, begin + i) if i == each or begin + i < order else 0.0
            for i in range(each + 1)
        ]
        for begin in reversed(range(0, order, each))
    ]

    # Loops, as XLA on CPU works a product out again wherever a later one reads it.
    def power(x: Array, _: None) -> tuple[Array, Array]:
        return entries.product(skew, x), x

    def nested(rest: Array, weights: Array) -> tuple[Array, None]:
        part = weights[each] * entries.product(highest, rest)
        return sum((weights[i] * powers[i] for i in range(each)), start=part), None

    identity = jnp.eye(z.shape[-1], dtype=z.dtype).reshape(z.shape[-2:] + (1,) * (z.ndim - 2))
    identity = jnp.broadcast_to(identity, skew.shape)
    highest, powers = lax.scan(power, identity, None, length=each)
    total, _ = lax.scan(nested, jnp.zeros_like(skew), jnp.asarray(weights, z.dtype))
    return entries.last(total)


def _ratio(small: int, large: int) -> float:
    """small! / large!."""
    return 1 / math.prod(range(small + 1, large + 1))


def householder(z: Array) -> Array:
    """-(I - 2 v_1 v_1^T) ... (I - 2 v_j v_j^T) for the rows v of z (... j j), made of length 1.

    Raises:
      ValueError: j is not a power of two, for which the original has no such product.
    """
    size = z.shape[-1]
    if size & (size - 1):
        raise ValueError(f"householder: matrices must have 2^n rows, got {z.shape}.")
    v = z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + SMALLEST_ROW)
    product = jnp.broadcast_to(jnp.eye(size, dtype=z.dtype), z.shape)
    for i in range(size):
        row = v[..., i, :]
        product = product - 2 * jnp.matmul(product, row[..., None]) * row[..., None, :]
    return -product


def qr(z: Array) -> Array:
    """Q of the decomposition z = Q R, (... j j); float32 at least."""
    return jnp.linalg.qr(z)[0]


def bounded_eigenvalue(z: Array, iterations: int) -> Array:
    """Z / max(1, lambda), with lambda an estimate of the largest eigenvalue by power iteration.

    Matrices that differ from the identity by less than 1e-3 in all are left as they are. The
    gradient takes the eigenvector for a constant, as the original's does.

    Args:
      z: (... j j).
      iterations: how often each of the two power iterations multiplies, >= 1.
    """
    return _bounded(z, iterations, False)


def bounded_singular_value(z: Array, iterations: int) -> Array:
    """Z / max(1, sigma), with sigma an estimate of the largest singular value; see
    `bounded_eigenvalue`. The gradient is the original's too, in which sigma's slope is not halved.
    """
    return _bounded(z, iterations, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _bounded(z: Array, iterations: int, singular: bool) -> Array:
    return _bounded_forward(z, iterations, singular)[0]


def _bounded_forward(z, iterations, singular):  # type: ignore[no-untyped-def]
    measured = jnp.matmul(z, jnp.swapaxes(z, -1, -2)) if singular else z
    size, vector = _largest_eigenvalue(measured, iterations)
    size = jnp.sqrt(size) if singular else size
    change = jnp.abs(measured - jnp.broadcast_to(jnp.eye(z.shape[-1], dtype=z.dtype), z.shape))
    kept = jnp.sum(change, axis=(-2, -1), keepdims=True) < SMALLEST_CHANGE
    return jnp.where(kept, z, z / size), (kept, size, vector)


def _bounded_backward(iterations, singular, residuals, dy):  # type: ignore[no-untyped-def]
    kept, size, vector = residuals
    along = jnp.matmul(dy, vector) * jnp.swapaxes(vector, -1, -2)
    return (jnp.where(kept, dy, dy / size - along / size**2),)


_bounded.defvjp(_bounded_forward, _bounded_backward)


def _largest_eigenvalue(z: Array, iterations: int) -> tuple[Array, Array]:
    """max(1, lambda) (... 1 1), and the vector (... j 1) by which it was found.

    A first power iteration on A = Z - I finds its largest eigenvalue a by size. If that is
    negative, a second one goes on with B = A - a I, whose largest is that of Z at its other end.
    But a vector that has converged in A is almost nothing in B, and what is left of it is mostly
    rounding. As A and B commute, the last vector is found as (B A)^n 1 instead, which converges to
    no other before.
    """
    eye = jnp.broadcast_to(jnp.eye(z.shape[-1], dtype=z.dtype), z.shape)
    a = z - eye
    ones = jnp.ones_like(z[..., :1])

    def lengths(matrix: Array, x: Array, count: int) -> Array:
        for _ in range(count):
            x = _shortened(jnp.matmul(matrix, x))
        return x

    x = lengths(a, ones, iterations)
    first = _quotient(x, a)
    shift = jnp.where(first < 0, first, jnp.zeros_like(first))
    b = a - shift * eye
    both = jnp.matmul(b, a)
    direction = jnp.matmul(a, ones)
    for _ in range(iterations - 1):
        direction = jnp.matmul(both, _unit(direction))
    length = jnp.linalg.norm(lengths(b, x, iterations - 1), axis=-2, keepdims=True)
    x = _shortened(jnp.matmul(b, length * _unit(direction)))
    return jnp.maximum(_quotient(x, b) + (1 + shift), 1), x


def _shortened(x: Array) -> Array:
    return x / (jnp.linalg.norm(x, axis=-2, keepdims=True) + SMALLEST_STEP)


def _unit(x: Array) -> Array:
    norm = jnp.linalg.norm(x, axis=-2, keepdims=True)
    return x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


def _quotient(x: Array, matrix: Array) -> Array:
    """x^T A x, (... 1 1)."""
    return jnp.matmul(jnp.swapaxes(x, -1, -2), jnp.matmul(matrix, x))
