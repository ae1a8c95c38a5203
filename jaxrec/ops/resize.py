"""Bicubic interpolation of a grid of vectors, as PyTorch's `interpolate` has it.

Keys' kernel with a = -3/4; pixel i of n covers [i, i+1) n-ths of the side; beyond the border the
outermost value goes on; nothing is smoothed when the grid gets smaller.

Keys, Cubic convolution interpolation for digital image processing (1981), IEEE TASSP 29(6).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

SLOPE = -0.75


def bicubic(grid: Array, shape: tuple[int, int]) -> Array:
    """Resizes (x y d) to (x' y' d).

    Args:
      grid: values.
      shape: (x', y').
    """
    along_x, along_y = (
        jnp.asarray(_weights(old, new), grid.dtype)
        for old, new in zip(grid.shape, shape, strict=False)
    )
    return jnp.einsum("ix,jy,xyd->ijd", along_x, along_y, grid, precision="highest")


def _weights(old: int, new: int) -> np.ndarray:
    """By what each of the old values enters each of the new ones, (new old)."""
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        begin = int(np.floor(centre)) - 1
        for j in range(begin, begin + 4):
            weights[i, min(max(j, 0), old - 1)] += _kernel(abs(centre - j))
    return weights


def _kernel(distance: float) -> float:
    if distance <= 1:
        return (SLOPE + 2) * distance**3 - (SLOPE + 3) * distance**2 + 1
    return SLOPE * (distance**3 - 5 * distance**2 + 8 * distance - 4)
