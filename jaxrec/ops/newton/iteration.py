"""Newton's iteration over the steps of one window, and the scan that stands in where it fails.

    r = f(h_{t-1}) - h_t,   d_t = J_t d_{t-1} + r_t,   h <- h + d

Steps whose residual and all residuals before are small are settled: they do not change any more,
so that neither later steps nor other elements of the batch have a say in their last digits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.newton import elk
from jaxrec.ops.newton.jacobian import Function, clipped, value_and_jacobian
from jaxrec.ops.newton.line import Line
from jaxrec.ops.time.loop import over_time

LARGEST_STATE = 1e8
"""Iterates are cut here, far from any state of a cell, so that their products do not overflow."""


class Rules(NamedTuple):
    """How to iterate."""

    max_iters: int
    tol: float
    only_diagonal: bool
    variance: float | None  # None: no filter
    relaxation: float
    clip: float | None
    safeguard: bool


class Outcome(NamedTuple):
    """How it ended."""

    h: Array  # (b t m n)
    iterations: Array  # int32 ()
    residual: Array  # (): the largest that was left, relative
    settled: Array  # bool (b t)
    all_settled: Array  # bool ()


class _Progress(NamedTuple):
    h: Array
    r: Array  # (b t m n), zero where settled
    jacobian: Array
    residual: Array  # (b t), relative
    settled: Array
    all_settled: Array  # bool ()
    iterations: Array


def iterate(
    function: Function,
    analytic: Function | None,
    start: Array,
    guess: Array,
    cut: Array,
    padding: Array,
    line: Line,
    rules: Rules,
) -> Outcome:
    """Solves h_t = f_t(h_{t-1}) for all steps of a window.

    Args:
      function: states before each step (b t m n) to those after.
      analytic: states before, the Jacobian (b t m m n); None: by derivatives.
      start: the state before the first step, (b m n).
      guess: where to begin, (b t m n).
      cut: bool (b t); True: zero enters this step.
      padding: bool (b t); True: nobody asks for this step or one behind it.
      line: of time.
      rules: how to iterate.
    """

    def look(h: Array, settled: Array, iterations: Array) -> _Progress:
        before = _where(cut, jnp.zeros((), h.dtype), line.before(h, start))
        value, jacobian = value_and_jacobian(
            function, before, analytic=analytic, only_diagonal=rules.only_diagonal
        )
        r = value - h
        size = jnp.maximum(jnp.max(jnp.abs(value), axis=(2, 3)), jnp.ones((), h.dtype))
        residual = jnp.where(padding, 0, jnp.max(jnp.abs(r), axis=(2, 3)) / size)
        residual = jnp.where(jnp.isfinite(residual), residual, jnp.inf)
        settled, all_settled = line.up_to(settled | (residual <= rules.tol))
        r = _where(settled | padding, jnp.zeros((), r.dtype), _finite(r))
        jacobian = _where(cut, jnp.zeros((), r.dtype), _finite(jacobian))
        return _Progress(h, r, jacobian, residual, settled, all_settled, iterations)

    def busy(progress: _Progress) -> Array:
        return (progress.iterations < rules.max_iters) & ~progress.all_settled

    def improve(progress: _Progress) -> _Progress:
        jacobian, r = progress.jacobian, progress.r
        if rules.clip is not None:
            jacobian = clipped(jacobian, rules.clip)
        if rules.variance is not None:
            jacobian, r = elk.damped(jacobian, r, rules.variance)
        h = progress.h + rules.relaxation * line.solve(jacobian, r)
        if rules.safeguard:
            h = jnp.where(jnp.isfinite(h), jnp.clip(h, -LARGEST_STATE, LARGEST_STATE), guess)
        return look(h, progress.settled, progress.iterations + 1)

    nothing = jnp.zeros_like(cut)
    progress = look(guess, nothing, jnp.zeros((), jnp.int32))
    progress = lax.while_loop(busy, improve, progress)
    residual = line.largest(progress.residual)
    return Outcome(
        progress.h, progress.iterations, residual, progress.settled, progress.all_settled
    )


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))


def _where(mask: Array, value: Array, x: Array) -> Array:
    """`value` where the mask (b t) says so, otherwise x (b t ...)."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), value, x)


def step_by_step(
    step: Callable[[Array, Any], Array], x: Any, start: Array, cut: Array | None, line: Line
) -> Array:
    """h_t = step(h_{t-1}, x_t), one after another; on a spread axis one device after another.

    Args:
      step: state (b ...) and inputs of one step to the next state.
      x: pytree of (b t ...).
      start: the state before the first step, (b ...).
      cut: bool (b t) or None; True: zero enters this step.
      line: of time.
    """

    def body(h: Array, inputs: Any) -> tuple[Array, Any]:
        x, cut = inputs
        if cut is not None:
            h = jnp.where(cut.reshape(-1, *[1] * (h.ndim - 1)), jnp.zeros((), h.dtype), h)
        h = step(h, x)
        return h, h

    if line.axis is None:
        return over_time(body, start, (x, cut))[1]
    size = lax.axis_size(line.axis)
    onwards = [(i, i + 1) for i in range(size - 1)]

    def hand_on(entering: Array, _: None) -> tuple[Array, None]:
        last, _ = over_time(body, entering, (x, cut))
        arrived = lax.ppermute(last, line.axis, onwards)
        return jnp.where(lax.axis_index(line.axis) == 0, start, arrived), None

    # After so many rounds every device has what enters it.
    first = jnp.where(lax.axis_index(line.axis) == 0, start, jnp.zeros_like(start))
    entering, _ = lax.scan(hand_on, first, None, length=size - 1)
    return over_time(body, entering, (x, cut))[1]
