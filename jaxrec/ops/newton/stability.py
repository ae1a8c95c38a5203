"""How a recurrence answers to a small change of its state, along a trajectory that was solved.

    J_t = df/dh at h_{t-1},   lambda = mean_t log |J_t v_{t-1}|,   v_t = J_t v_{t-1} / |J_t v_{t-1}|

Below zero a change dies out and Newton's method needs few iterations at any length; above zero it
grows, and no method that is parallel over time can be fast.

Gonzalez et al., Predictability enables parallelization of nonlinear state space models (2025),
arXiv:2508.16817, section 3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.newton import structure as structures
from jaxrec.ops.newton.jacobian import value_and_jacobian
from jaxrec.ops.newton.structure import Kind, Step
from jaxrec.ops.time import block
from jaxrec.ops.time.scan import shifted

STARTS = 3
"""Directions that are followed where numbers mix."""


class Stability(NamedTuple):
    """Scalars."""

    largest: Array  # the largest |entry| of any J_t
    exponent: Array  # largest Lyapunov exponent, nats per step, estimated


def stability(
    step: Step,
    params: Any,
    x: Any,
    h0: Array,
    h: Array,
    *,
    jacobian: Kind,
    reset: Array | None = None,
) -> Stability:
    """The Jacobians of a cell along h, as `newton_scan` has returned it.

    A group of numbers that mix has an exponent of its own, averaged over time and batch, and the
    largest of them counts: of a diagonal Jacobian mean log |J|, otherwise the mean over some random
    directions. No gradient is meant to pass. All Jacobians are in memory at once, (b t m m n).

    Args:
      step: (params, h, x_t) -> h, see `newton_scan`.
      params: of the step.
      x: pytree of (b t ...).
      h0: state before the first step, (b ...).
      h: states after each step, (b t ...).
      jacobian: which numbers mix.
      reset: bool (b t). True: the state that enters this step is zero; the Jacobian is taken there,
        and directions are followed on.
    """
    structure = structures.find(jacobian, step, params, h0, None, check=False)
    before = _before(h0, h, reset)
    at_all_times = jax.vmap(step, in_axes=(None, 1, 1), out_axes=1)
    _, matrices = value_and_jacobian(
        lambda h: structure.split(at_all_times(params, structure.joined(h), x)),
        structure.split(before),
    )
    largest = jnp.max(jnp.abs(matrices))
    if structure.size == 1:
        return Stability(largest, jnp.max(jnp.mean(_log(jnp.abs(matrices)), axis=(0, 1))))
    batch, _, size, _, groups = matrices.shape
    start = jax.random.normal(jax.random.key(0), (STARTS, batch, size, groups), matrices.dtype)

    def follow(v: Array, matrix: Array) -> tuple[Array, Array]:
        moved = jax.vmap(block.apply, in_axes=(None, 0))(matrix, v)
        norm = jnp.sqrt(jnp.sum(jnp.square(moved), axis=2, keepdims=True))
        # Where a direction is lost, as after a step that forgets all, the old one begins anew.
        return jnp.where(norm > 0, moved / _positive(norm), v), _log(norm[:, :, 0])

    unit = start / jnp.sqrt(jnp.sum(jnp.square(start), axis=2, keepdims=True))
    _, growth = lax.scan(follow, unit, jnp.swapaxes(matrices, 0, 1))
    return Stability(largest, jnp.max(jnp.mean(growth, axis=(0, 1, 2))))


def row_residuals(
    step: Step, params: Any, x: Any, h0: Array, h: Array, *, reset: Array | None = None
) -> Array:
    """max_t |f(h_{t-1}, x_t) - h_t| / max(1, |f(h_{t-1}, x_t)|) of each row, (b), |.| the largest
    number of a state; inf where one is not finite. Arguments as of `stability`.
    """
    value = jax.vmap(step, in_axes=(None, 1, 1), out_axes=1)(params, _before(h0, h, reset), x)
    axes = tuple(range(2, h.ndim))
    size = jnp.maximum(jnp.max(jnp.abs(value), axis=axes), jnp.ones((), h.dtype))
    residual = jnp.max(jnp.abs(value - h), axis=axes) / size
    return jnp.max(jnp.where(jnp.isfinite(residual), residual, jnp.inf), axis=1)


def _before(h0: Array, h: Array, reset: Array | None) -> Array:
    """The state that enters each step, zero where it is reset."""
    before = shifted(h, h0.astype(h.dtype), towards_start=False)
    if reset is None:
        return before
    return jnp.where(reset.reshape(*reset.shape, *[1] * (h.ndim - 2)), 0, before)


def _positive(x: Array) -> Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def _log(x: Array) -> Array:
    return jnp.log(_positive(x))
