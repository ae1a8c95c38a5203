"""The angle of Adam-atan2, at the speed of a quotient."""

import jax.numpy as jnp
import numpy as np
from jax import Array

SERIES = (
    -0.33333153,
    0.19993773,
    -0.14211055,
    0.10666004,
    -0.075522136,
    0.043211853,
    -0.016367923,
    0.002920691,
)
"""(arctan(t) / t - 1) / t^2 in powers of t^2, of the least largest error on [0, 1]: in float32 that
of arctan is 3e-8 of its value."""


def angle(y: Array, x: Array) -> Array:
    """arctan2(y, x), the angle of (x, y), for x >= 0, in radians from -pi/2 to pi/2; 0 at (0, 0).

    With t = min(|y|, x) / max(|y|, x), it is arctan(t) where |y| <= x and pi/2 - arctan(t) where it
    is not, with the sign of y. The error is at most 4e-7 of the value. A plain `jnp.arctan2` calls
    a scalar function for each number on CPU and takes thirty times as long.

    Args:
      y: float32.
      x: float32 >= 0, like y.
    """
    height = jnp.abs(y)
    t = jnp.minimum(height, x) / jnp.maximum(height, x)
    t = jnp.where(height == x, jnp.sign(x), t)  # where both are zero, or both infinite, too
    square = t * t
    series = jnp.full_like(t, SERIES[-1])
    for coefficient in SERIES[-2::-1]:
        series = series * square + coefficient
    below = t + t * (square * series)
    return jnp.copysign(jnp.where(height > x, np.pi / 2 - below, below), y)
