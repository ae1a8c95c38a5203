"""A loop over time, the second axis of arrays (b t ...)."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

State = TypeVar("State")
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
    as it is for a batch of one. For recurrences whose gradient is written by hand: that of JAX
    would add up an array as large as the inputs in each step.

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
    batch, time = leaves[0].shape[:2]
    if batch == 1 or sum(math.prod(x.shape[2:]) for x in leaves) >= LONG:
        return _in_place(step, state, inputs, time, reverse, unroll)
    time_first = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), inputs)
    last, results = lax.scan(step, state, time_first, reverse=reverse, unroll=unroll)
    return last, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), results)


def _in_place(
    step: Callable[[State, Any], tuple[State, Any]],
    state: State,
    inputs: Any,
    time: int,
    reverse: bool,
    unroll: int,
) -> tuple[State, Any]:
    def at(place: Array | int) -> Any:
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, place, axis=1, keepdims=False), inputs
        )

    def body(i: Array, carry: tuple[State, Any]) -> tuple[State, Any]:
        state, results = carry
        place = time - 1 - i if reverse else i
        state, now = step(state, at(place))
        results = jax.tree.map(
            lambda x, y: lax.dynamic_update_index_in_dim(x, y, place, axis=1), results, now
        )
        return state, results

    _, shapes = jax.eval_shape(step, state, jax.eval_shape(at, 0))
    nothing = jax.tree.map(lambda x: jnp.zeros((x.shape[0], time, *x.shape[1:]), x.dtype), shapes)
    return lax.fori_loop(0, time, body, (state, nothing), unroll=min(unroll, time))
