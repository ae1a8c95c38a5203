"""What the linear time-invariant layers share: their time steps, which of their two views runs, and
whether they are stable.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.ops.discretize import is_stable

View = Literal["auto", "conv", "scan"]


def check_steps(name: str, smallest: float, largest: float) -> None:
    """Refuses a range of time steps that is not 0 < smallest <= largest."""
    if not 0 < smallest <= largest < float("inf"):
        raise ValueError(
            f"{name}: step sizes need 0 < dt_min <= dt_max, got {smallest} and {largest}."
        )


def log_uniform_steps(key: Array, shape: tuple[int, ...], least: float, most: float) -> Array:
    """log dt for steps spread evenly on a logarithmic scale, float32."""
    return jax.random.uniform(key, shape, minval=np.log(least), maxval=np.log(most))


def rescaled_step(name: str, log_step: Array, rescale: float | Array) -> Array:
    """dt = rescale exp(log_step), float32.

    Args:
      name: of the layer, for the message.
      log_step: (...).
      rescale: > 0: 2 for a signal that has every second sample of those in training. A scalar, or
        of a shape that broadcasts with log_step's.
    """
    if not isinstance(rescale, jax.core.Tracer) and not np.all(np.asarray(rescale) > 0):
        raise ValueError(f"{name}: step_rescale must be > 0, got {np.min(np.asarray(rescale))}.")
    return jnp.exp(log_step.astype(jnp.float32)) * jnp.asarray(rescale, jnp.float32)


def check_one_step(name: str, rescale: float | Array) -> None:
    """Refuses a factor for every step where one system runs over all of them."""
    if jnp.ndim(rescale):
        raise ValueError(
            f"{name}: step_rescale must be one number, got shape {jnp.shape(rescale)}. Samples at"
            " unequal intervals are for S5."
        )


def decay_measures(largest_decay: Array) -> dict[str, Array]:
    """What a model says of its linear recurrences (...): largest_decay, the largest |a| of all, and
    unstable, 0 if that `is_stable`, else 1: states grow without bound.
    """
    largest = jnp.max(largest_decay)
    return {
        "largest_decay": largest,
        "unstable": 1 - is_stable(largest[None]).astype(jnp.float32),
    }


def start(name: str, state: Array | None, x: Array, zeros: Array) -> Array:
    """The given state, or zeros; one that does not belong to this batch is refused."""
    if state is None:
        return zeros
    if state.shape != zeros.shape:
        raise ValueError(
            f"{name}: x {x.shape} needs a state of shape {zeros.shape}, got {state.shape}."
            " Take it from init_state or from the call before, with the same batch size."
        )
    return state


def convolves(name: str, method: View, state: Array | None, reset: Array | None) -> bool:
    """Whether the convolutional view runs; it knows neither a state to begin with nor resets."""
    if method not in get_args(View):
        raise ValueError(f"{name}: method must be one of {get_args(View)}, got {method!r}.")
    anew = state is None and reset is None
    if method == "conv" and not anew:
        raise ValueError(
            f"{name}: method 'conv' begins at zero and knows no resets; give neither state nor"
            " reset, or use 'scan'."
        )
    return anew and method != "scan"
