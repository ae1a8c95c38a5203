"""A loop over time, the second axis of arrays (b t ...)."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

State = TypeVar("State")
Closed = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(constants, state, inputs) -> (state, results): a step that refers to nothing else."""
LONG = 1024
"""Numbers that all inputs have for a row of the batch in one step, from which on they stay in
place. Measured on CPU, where several short pieces in different places take longer to read than one.
"""


def over_time(
    step: Callable[[State, Any], tuple[State, Any]],
    state: State,
    inputs: Any,
    *,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[State, Any]:
    """`lax.scan` along axis 1.

    `lax.scan` needs time in front: arrays are copied there and back, which takes longer than a
    recurrence of large states. What a step needs is then read where it lies, and written likewise,
    as it is for a batch of one. A derivative is that of `lax.scan`: of places in arrays it would
    add up an array as large as the inputs in each step.

    Args:
      step: the state and a pytree of (b ...), to the next state and a pytree of results (b ...).
      state: before the first step.
      inputs: pytree of (b t ...).
      reverse: begins with the last step.
      unroll: steps in one round of the loop.

    Returns:
      The last state, and the results of all steps, (b t ...).
    """
    leaves = jax.tree.leaves(inputs)
    if leaves[0].shape[0] > 1 and sum(math.prod(x.shape[2:]) for x in leaves) < LONG:
        return _time_first(lambda _, *args: step(*args), reverse, unroll, (), state, inputs)
    # What the step refers to must be an argument to have a derivative.
    closed, constants = jax.closure_convert(step, state, jax.eval_shape(_at, inputs, 0))
    return _in_place(lambda c, *args: closed(*args, *c), reverse, unroll, constants, state, inputs)


def _at(x: Any, place: Array | int) -> Any:
    """What all arrays of a pytree have at one place of axis 1."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, place, axis=1, keepdims=False), x
    )


def _time_first(
    step: Closed, reverse: bool, unroll: int, constants: Any, state: Any, inputs: Any
) -> tuple[Any, Any]:
    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), inputs)
    last, results = lax.scan(
        functools.partial(step, constants), state, inputs, reverse=reverse, unroll=unroll
    )
    return last, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), results)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _in_place(
    step: Closed, reverse: bool, unroll: int, constants: Any, state: Any, inputs: Any
) -> tuple[Any, Any]:
    time = jax.tree.leaves(inputs)[0].shape[1]

    def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, results = carry
        place = time - 1 - i if reverse else i
        state, now = step(constants, state, _at(inputs, place))
        results = jax.tree.map(
            lambda x, y: lax.dynamic_update_index_in_dim(x, y, place, axis=1), results, now
        )
        return state, results

    _, shapes = jax.eval_shape(step, constants, state, jax.eval_shape(_at, inputs, 0))
    nothing = jax.tree.map(lambda x: jnp.zeros((x.shape[0], time, *x.shape[1:]), x.dtype), shapes)
    return lax.fori_loop(0, time, body, (state, nothing), unroll=min(unroll, time))


@_in_place.defjvp
def _in_place_jvp(
    step: Closed, reverse: bool, unroll: int, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    return jax.jvp(functools.partial(_time_first, step, reverse, unroll), primals, tangents)
