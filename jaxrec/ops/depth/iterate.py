"""The recurrence in depth, z^{k+1} = step(z^k): one block applied n times, n known or traced.

The value never depends on what is asked of the gradient. `grad_steps` only says how many of the
last steps the gradient passes through (truncated backpropagation: Williams & Peng 1990; for looped
transformers, Geiping et al. 2025, arXiv:2502.05171, section 3), and `until` halts elements one by
one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops import notes
from jaxrec.ops.depth.remat import RematPolicy, remat_scan

Step = Callable[[Any], Any]
Until = Callable[[Any, Any], Array]


class IterateInfo(NamedTuple):
    """How a loop ended."""

    steps: Array  # int32: steps taken, () or, with `until`, one count per element
    converged: Array  # bool, same shape: `until` held before n ran out (False without `until`)


class _Loop(NamedTuple):
    z: Any
    taken: Array  # int32 (), steps that the loop has run
    info: IterateInfo


def iterate(
    step: Step,
    z: Any,
    n: int | Array,
    *,
    grad_steps: int | None = None,
    until: Until | None = None,
    remat: RematPolicy = "none",
) -> tuple[Any, IterateInfo]:
    """Applies `step` n times to z.

    Args:
      step: z -> z, same structure, shapes and dtypes. It may close over parameters.
      z: pytree of arrays.
      n: number of steps, >= 0; a Python int or a traced int32 (one compilation serves every n).
      grad_steps: the gradient passes through the last `grad_steps` steps only. When n is larger,
        the steps before run without gradient and z receives none; when n is smaller, everything is
        differentiated, and steps that a traced n leaves out are computed all the same. None:
        through all n steps if n is an int and `until` is None; otherwise reverse-mode
        differentiation is not possible and JAX says so. A bound on n makes a traced loop fully
        differentiable.
      until: (new z, old z) -> bool array over leading axes of z, such as (b) or (b t). An element
        for which it holds keeps that new z from then on. The loop ends early once all have halted.
      remat: what the gradient of the last `grad_steps` steps stores, see `remat_scan`.

    Returns:
      z after the loop, and an `IterateInfo`.

    Raises:
      ValueError: n or grad_steps is a negative int, or `until` does not return a bool array.
    """
    for name, count in (("n", n), ("grad_steps", grad_steps)):
        if isinstance(count, int) and count < 0:
            raise ValueError(f"iterate: {name} must be >= 0, got {count}.")
    if isinstance(n, int) and until is None:
        # Of what is noted in a loop of known length, every step has a place.
        if grad_steps is None or notes.is_collecting():
            grad_steps = n
    else:
        step = notes.silently(step)
    advance = _advance(step, until)
    start = _start(step, z, until)
    if isinstance(n, int) and grad_steps is not None:
        grad_steps = min(grad_steps, n)
    free_steps = n if grad_steps is None else jnp.maximum(n - grad_steps, 0)

    loop = start
    if not (isinstance(n, int) and n == grad_steps):
        loop = _run_without_gradient(advance, start, free_steps, until, stop=grad_steps is not None)
    if grad_steps:
        if not isinstance(n, int):
            # With no free step the gradient reaches z itself.
            loop = loop._replace(
                z=jax.tree.map(lambda old, new: jnp.where(free_steps > 0, new, old), z, loop.z)
            )

        def graded(loop: _Loop, _: None) -> tuple[_Loop, None]:
            if isinstance(n, int) and until is None:
                return advance(loop), None
            busy = jnp.logical_and(loop.taken < n, ~_all_halted(loop.info, until))
            # Not lax.cond: its gradient would store the weights that a step reads, once per step.
            return jax.tree.map(functools.partial(jnp.where, busy), advance(loop), loop), None

        loop, _ = remat_scan(graded, loop, None, length=grad_steps, remat=remat)
    return loop.z, loop.info


def _start(step: Step, z: Any, until: Until | None) -> _Loop:
    shape: tuple[int, ...] = ()
    if until is not None:
        halted = jax.eval_shape(lambda z: until(step(z), z), z)
        if getattr(halted, "dtype", None) != jnp.bool_:
            raise ValueError(f"iterate: until must return a bool array, got {halted}.")
        shape = halted.shape
    steps = jnp.zeros(shape, jnp.int32)
    return _Loop(z, jnp.zeros((), jnp.int32), IterateInfo(steps, jnp.zeros(shape, jnp.bool_)))


def _advance(step: Step, until: Until | None) -> Callable[[_Loop], _Loop]:
    def advance(loop: _Loop) -> _Loop:
        new = step(loop.z)
        if until is None:
            return _Loop(new, loop.taken + 1, loop.info._replace(steps=loop.info.steps + 1))
        halted = loop.info.converged
        info = IterateInfo(
            steps=loop.info.steps + jnp.where(halted, 0, 1),
            converged=halted | until(new, loop.z),
        )
        return _Loop(_keep(halted, loop.z, new), loop.taken + 1, info)

    return advance


def _keep(halted: Array, old: Any, new: Any) -> Any:
    """`old` where halted, else `new`; halted covers the leading axes of every leaf."""

    def choose(old: Array, new: Array) -> Array:
        return jnp.where(halted.reshape(halted.shape + (1,) * (old.ndim - halted.ndim)), old, new)

    return jax.tree.map(choose, old, new)


def _all_halted(info: IterateInfo, until: Until | None) -> Array:
    return jnp.all(info.converged) if until is not None else jnp.zeros((), jnp.bool_)


def _run_without_gradient(
    advance: Callable[[_Loop], _Loop],
    start: _Loop,
    steps: int | Array,
    until: Until | None,
    *,
    stop: bool,
) -> _Loop:
    """A while loop. With `stop`, no gradient reaches what it reads or closes over."""
    closed_over: list[Any] = []
    body: Callable[..., _Loop] = advance
    if stop:
        start = lax.stop_gradient(start)
        body, closed_over = jax.closure_convert(advance, start)
        closed_over = lax.stop_gradient(closed_over)

    def busy(loop: _Loop) -> Array:
        return jnp.logical_and(loop.taken < steps, ~_all_halted(loop.info, until))

    return lax.while_loop(busy, lambda loop: body(loop, *closed_over), start)
