"""What `newton_scan` refuses before anything is computed."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jaxrec.ops.newton.kernel import THREADS

CHUNKS = tuple(2**i for i in range(THREADS.bit_length()))
Method = Literal["auto", "sequential", "newton", "quasi_newton", "elk", "quasi_elk", "pallas"]


def numbers(
    method: str,
    max_iters: int | None,
    window: int | None,
    chunks: int | None,
    relaxation: float,
    clip: float | None,
    variance: float,
    axis: str | None,
) -> None:
    """Refuses numbers out of range and what does not go together.

    Raises:
      ValueError: see `newton_scan`.
    """
    if method not in get_args(Method):
        raise ValueError(f"newton_scan: method must be one of {get_args(Method)}, got {method!r}.")
    if window is not None and window < 1:
        raise ValueError(f"newton_scan: window must be at least one step, got {window}.")
    if chunks is not None and method != "pallas":
        raise ValueError(
            f'newton_scan: chunks={chunks} belongs to method="pallas", got method={method!r}.'
        )
    if chunks is not None and chunks not in CHUNKS:
        raise ValueError(f"newton_scan: chunks must be one of {CHUNKS}, got {chunks}.")
    if max_iters is not None and max_iters < 0:
        raise ValueError(f"newton_scan: max_iters must be >= 0, got {max_iters}.")
    for name, value in (("relaxation", relaxation), ("clip", clip), ("variance", variance)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"newton_scan: {name} must be positive and finite, got {value}.")
    if axis is not None and (window is not None or method in ("elk", "quasi_elk", "pallas")):
        raise ValueError(
            "newton_scan: where time is spread over devices there are no windows, no filter (elk)"
            f" and no kernel; got axis={axis!r}, window={window}, method={method!r}."
        )


def arrays(x: Any, h0: Array, reset: Array | None, guess: Array | None) -> int:
    """Refuses shapes and dtypes that do not fit; returns the number of steps.

    Raises:
      ValueError: see `newton_scan`.
    """
    leaves = jax.tree.leaves(x)
    if not leaves or h0.ndim < 1 or any(leaf.ndim < 2 for leaf in leaves):
        raise ValueError(
            "newton_scan: x must be a pytree of at least one (b t ...) and h0 (b ...), got"
            f" {[leaf.shape for leaf in leaves]} and {h0.shape}."
        )
    lengths = {leaf.shape[:2] for leaf in leaves}
    batch, time = leaves[0].shape[:2]
    if len(lengths) > 1 or batch != h0.shape[0] or time == 0:
        raise ValueError(
            "newton_scan: all of x must be (b t ...) with the b of h0 and one t >= 1, got"
            f" {[leaf.shape for leaf in leaves]} and h0 {h0.shape}."
        )
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"newton_scan: reset must be bool (b t) = {(batch, time)}, got {reset.dtype}"
            f" {reset.shape}."
        )
    wanted = (batch, time, *h0.shape[1:])
    if guess is not None and guess.shape != wanted:
        raise ValueError(f"newton_scan: guess must be (b t ...) = {wanted}, got {guess.shape}.")
    return time


def axis(axis: str, time: int) -> None:
    """Refuses a mesh axis that is not there or does not divide the steps.

    Raises:
      ValueError: see `newton_scan`.
    """
    size = jax.sharding.get_abstract_mesh().shape.get(axis)
    if size is None:
        raise ValueError(f"newton_scan: the current mesh has no axis {axis!r} (jax.set_mesh).")
    if time % size:
        raise ValueError(f"newton_scan: {time} steps do not divide over {axis}={size} devices.")
