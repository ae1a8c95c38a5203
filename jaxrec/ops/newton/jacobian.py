"""The value of a cell at all steps at once, and its Jacobian there, by structure.

A diagonal one takes one derivative in the direction of ones, blocks of m take m, and so does a
dense one. They are (b t m n) where only diagonals are kept, otherwise (b t m m n).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

Function = Callable[[Array], Array]


def value_and_jacobian(
    function: Function, h: Array, *, analytic: Function | None = None, only_diagonal: bool = False
) -> tuple[Array, Array]:
    """The value of a function of states (b t m n) that mixes the m, and its Jacobian.

    Args:
      function: (b t m n) -> (b t m n).
      h: where.
      analytic: the Jacobian (b t m m n) as a function of h, instead of derivatives.
      only_diagonal: leave out what is not on the diagonal.

    Returns:
      The value, and the Jacobian (b t m n) if it is diagonal, otherwise (b t m m n).
    """
    size = h.shape[2]
    if analytic is not None:
        matrices = analytic(h)
        if size == 1:
            return function(h), matrices[:, :, 0]
        if only_diagonal:
            return function(h), jnp.moveaxis(jnp.diagonal(matrices, axis1=2, axis2=3), -1, 2)
        return function(h), matrices
    if size == 1:
        return jax.jvp(function, (h,), (jnp.ones_like(h),))
    value, linear = jax.linearize(function, h)
    if only_diagonal:
        # One column at a time, of which one row is kept: the matrices are never in memory.
        def entry(j: Array) -> Array:
            direction = jnp.broadcast_to(_unit(j, size, h), h.shape)
            return lax.dynamic_index_in_dim(linear(direction), j, axis=2, keepdims=False)

        return value, jnp.moveaxis(lax.map(entry, jnp.arange(size, dtype=jnp.int32)), 0, 2)

    def column(j: Array) -> Array:
        return linear(jnp.broadcast_to(_unit(j, size, h), h.shape))

    return value, jax.vmap(column, out_axes=3)(jnp.arange(size, dtype=jnp.int32))


def _unit(j: Array, size: int, like: Array) -> Array:
    unit = jnp.arange(size, dtype=jnp.int32) == j
    return unit.astype(like.dtype)[None, None, :, None]


def clipped(jacobian: Array, limit: float) -> Array:
    """Diagonals cut to [-limit, limit]; matrices scaled down to a Frobenius norm of the limit."""
    if jacobian.ndim == 4:
        return jnp.clip(jacobian, -limit, limit)
    norm = jnp.sqrt(jnp.sum(jnp.square(jacobian), axis=(2, 3), keepdims=True))
    return jacobian * (limit / jnp.maximum(norm, limit))
