"""What the steps of one chunk of a matrix recurrence do to each other, without large exponentials.

Decays between all pairs of steps, with running sums whose differences lose no digits, and the
lower triangular system of the delta rule (the UT transform).

Yang et al., Gated linear attention transformers with hardware-efficient training (2023),
arXiv:2312.06635, section 4; Yang et al., Parallelizing linear transformers with the delta rule over
sequence length (2024), arXiv:2406.06484, section 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

FORWARD_SUBSTITUTION = 8
"""Blocks of this size are inverted row by row, larger ones from their quarters."""


def zero_decay(dtype: Any) -> float:
    """A log decay whose exponential is zero, and so small that sums of it keep many digits."""
    return -128.0 if dtype == jnp.float32 else -1024.0


class Sums(NamedTuple):
    """Running sums of log decays, in two parts whose differences lose no digits.

    A chunk may hold a decay of 1e-38 and then some of 0.9999: the difference of two plain sums has
    the absolute error of the largest. The coarse part holds multiples of a power of two, of which
    all sums are exact; the fine part is small.
    """

    coarse: Array
    fine: Array

    def total(self) -> Array:
        """The sums, rounded."""
        return self.coarse + self.fine

    def minus(self, other: "Sums") -> Array:
        """The differences, rounded once."""
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def map(self, function: Callable[[Array], Array]) -> "Sums":
        """Both parts, moved about alike."""
        return Sums(function(self.coarse), function(self.fine))

    def row(self, i: int) -> "Sums":
        """Step i alone, as an axis of size 1."""
        return self.map(lambda x: x[..., i, None, :])


def running_sums(log_decay: Array) -> Sums:
    """Sums over the steps (... c k) up to and with each."""
    largest = -log_decay.shape[-2] * zero_decay(log_decay.dtype)
    digits = jnp.finfo(log_decay.dtype).nmant
    unit = 2.0 ** (np.ceil(np.log2(largest)) - digits)
    coarse = lax.stop_gradient(jnp.round(log_decay / unit) * unit)
    # As products with ones, which are made once: XLA on CPU would work cumulative sums out anew for
    # every pair of steps. NaN, which a product would spread to earlier steps, is counted apart.
    earlier = np.tri(log_decay.shape[-2], dtype=log_decay.dtype).T

    def summed(x: Array) -> Array:
        # Steps last: beside an axis of size 1 it would not be a product for XLA.
        sums = jnp.matmul(jnp.swapaxes(x, -1, -2), earlier, precision=lax.Precision.HIGHEST)
        return jnp.swapaxes(sums, -1, -2)

    unknown = jnp.isnan(log_decay)
    parts = Sums(coarse, log_decay - coarse).map(lambda x: jnp.where(unknown, 0, x))
    sums = parts.map(summed)
    unknown_yet = summed(unknown.astype(log_decay.dtype))
    return sums._replace(coarse=jnp.where(unknown_yet > 0, jnp.nan, sums.coarse))


def decayed_products(x: Array, k: Array, sums: Sums | None, heads: int) -> Array:
    """A_ij = sum_k x_ik k_jk exp(b_ik - b_jk) for i >= j, otherwise 0, (... h c c), from x and keys
    (... g c k), each for h / g heads in a row, and sums b (... h c 1), or (... h c k) if g is h.
    No exponential of a positive number is taken.
    """
    seen = np.tri(x.shape[-2], dtype=bool)
    if sums is None or sums.fine.shape[-1] == 1:
        products = jnp.matmul(x, jnp.swapaxes(k, -1, -2))
        products = jnp.repeat(products, heads // products.shape[-3], axis=-3)
        if sums is None:
            return jnp.where(seen, products, 0)
        return products * _exp(seen, sums.minus(sums.map(lambda b: jnp.swapaxes(b, -1, -2))))
    products = jnp.sum(x * k, axis=-1)[..., None, None]  # (... c 1 1), then stretches twice as long
    while products.shape[-1] < x.shape[-2]:
        products = _merged(products, _between_halves(x, k, sums, products.shape[-1]))
    return products[..., 0, :, :]


def _between_halves(x: Array, k: Array, sums: Sums, size: int) -> Array:
    """What the later half of every stretch of 2 `size` steps sees of the earlier, (... m s s).

    The decay parts in two: since the later half began, and from then back; both below 1.
    """
    (earlier, _), (_, later) = _halves(k, size), _halves(x, size)
    coarse, fine = _halves(sums.coarse, size), _halves(sums.fine, size)
    b_earlier, b_later = Sums(coarse[0], fine[0]), Sums(coarse[1], fine[1])
    border = b_later.row(0)
    later = later * jnp.exp(b_later.minus(border))
    earlier = earlier * jnp.exp(border.minus(b_earlier))
    return jnp.matmul(later, jnp.swapaxes(earlier, -1, -2))


def _halves(x: Array, size: int) -> tuple[Array, Array]:
    """The first and second half of every stretch of 2 `size` rows: (... c k) to (... m size k)."""
    x = x.reshape(*x.shape[:-2], x.shape[-2] // (2 * size), 2, size, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _merged(blocks: Array, corners: Array) -> Array:
    """Lower triangular blocks (... 2m s s) two by two, and what lies below the first and left of
    the second, (... m s s): (... m 2s 2s).
    """
    first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([corners, second], axis=-1)], axis=-2)


@jax.custom_vjp
def solve(system: Array, right: Array) -> Array:
    """(I + system)^-1 right, for a system (... c c) that is zero on and above the diagonal."""
    return jnp.matmul(_inverse(system), right)


def _solve_forward(system: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _inverse(system)
    solution = jnp.matmul(inverse, right)
    return solution, (inverse, solution)


def _solve_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    inverse, solution = residuals
    dright = jnp.matmul(jnp.swapaxes(inverse, -1, -2), cotangent)
    return -jnp.matmul(dright, jnp.swapaxes(solution, -1, -2)), dright


solve.defvjp(_solve_forward, _solve_backward)


def _inverse(system: Array) -> Array:
    """(I + system)^-1, from the inverses of blocks on the diagonal.

    Not LAPACK's solver: on CPU it takes milliseconds for systems of this size.
    """
    steps = system.shape[-1]
    size = min(steps, FORWARD_SUBSTITUTION)
    blocks = _diagonal_blocks(system, size)
    identity = jnp.broadcast_to(jnp.eye(size, dtype=system.dtype), blocks.shape)
    inverse = identity[..., :1, :]
    for i in range(1, size):
        known = jnp.sum(blocks[..., i, :i, None] * inverse, axis=-2)
        row = identity[..., i, :] - known
        inverse = jnp.concatenate([inverse, row[..., None, :]], axis=-2)
    while size < steps:
        corners = _diagonal_blocks(system, 2 * size)[..., size:, :size]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        inverse = _merged(inverse, -jnp.matmul(jnp.matmul(second, corners), first))
        size *= 2
    return inverse[..., 0, :, :]


def _diagonal_blocks(x: Array, size: int) -> Array:
    """(... c c) to (... m size size)."""
    count = x.shape[-1] // size
    x = x.reshape(*x.shape[:-2], count, size, count, size)
    return jnp.moveaxis(jnp.diagonal(x, axis1=-4, axis2=-2), -1, -3)


def _exp(where: np.ndarray, exponent: Array) -> Array:
    """The exponential, 0 where it is not wanted; also its gradient, however large the exponent."""
    return jnp.exp(jnp.where(where, exponent, -jnp.inf))
