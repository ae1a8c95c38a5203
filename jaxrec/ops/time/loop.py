"""A loop over time, the second axis of arrays (b t ...)."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

State = TypeVar("State")
LONG_ROW = 1024
"""Numbers, of all inputs in one step of one row of the batch, from which on rows stay in place:
shorter ones take longer to read from b places than from one. Measured on CPU only."""


def over_time(
    step: Callable[[State, Any], tuple[State, Any]],
    state: State,
    inputs: Any,
    *,
    reverse: bool = False,
    unroll: int = 1,
) -> tuple[State, Any]:
    """`lax.scan` along axis 1.

    `lax.scan` needs time in front, so all arrays are copied there and results back, which takes
    longer than a recurrence of large states: all in all about twice as long on CPU, for (1, 65536,
    64) (`benchmarks/results/scan_cpu.json`). Here rows that are long, or of a batch of one, are
    read and written in place. Differentiated it is `lax.scan`: the derivative of reading one place
    is an array as large as the inputs, and every step would add one.

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
    if leaves[0].shape[0] > 1 and sum(math.prod(x.shape[2:]) for x in leaves) < LONG_ROW:
        return _time_first(step, reverse, unroll, state, inputs)
    # What the step refers to must be an argument to have a derivative.
    closed, constants = jax.closure_convert(step, state, jax.eval_shape(_at, inputs, 0))
    return _in_place(closed, reverse, unroll, constants, state, inputs)


def _at(x: Any, place: Array | int) -> Any:
    """What all arrays of a pytree have at one place of axis 1."""
    return jax.tree.map(
        lambda leaf: lax.dynamic_index_in_dim(leaf, place, axis=1, keepdims=False), x
    )


def _time_first(
    step: Callable[..., Any], reverse: bool, unroll: int, state: Any, inputs: Any
) -> tuple[Any, Any]:
    inputs = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), inputs)
    last, results = lax.scan(step, state, inputs, reverse=reverse, unroll=unroll)
    return last, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), results)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _in_place(
    step: Callable[..., Any], reverse: bool, unroll: int, constants: Any, state: Any, inputs: Any
) -> tuple[Any, Any]:
    time = jax.tree.leaves(inputs)[0].shape[1]

    def body(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, results = carry
        place = time - 1 - i if reverse else i
        state, now = step(state, _at(inputs, place), *constants)
        results = jax.tree.map(
            lambda x, y: lax.dynamic_update_index_in_dim(x, y, place, axis=1), results, now
        )
        return state, results

    # Made from what a step gives, so that they are spread over devices as it is.
    _, now = step(state, _at(inputs, 0), *constants)
    nothing = jax.tree.map(
        lambda y: jnp.zeros_like(jnp.broadcast_to(y[:, None], (len(y), time, *y.shape[1:]))), now
    )
    return lax.fori_loop(0, time, body, (state, nothing), unroll=min(unroll, time))


@_in_place.defjvp
def _in_place_jvp(
    step: Callable[..., Any], reverse: bool, unroll: int, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    def run(constants: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        def with_constants(state: Any, now: Any) -> Any:
            return step(state, now, *constants)

        return _time_first(with_constants, reverse, unroll, state, inputs)

    return jax.jvp(run, primals, tangents)
