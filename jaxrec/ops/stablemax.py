"""Stablemax: a softmax with powers in place of exponentials, which does not saturate."""

import jax.numpy as jnp
from jax import Array


def log_stablemax(x: Array) -> Array:
    """log p of p = s(x) / sum s(x) over the last axis, s(x) = x + 1 for x >= 0, 1 / (1 - x) below.

    Logarithms are taken of s itself, so float32 is enough where the quotient would need float64.

    Args:
      x: scores (... c), float32.

    Prieto et al., Grokking at the edge of numerical stability (2025), arXiv:2501.04697, section 4.
    """
    above = x >= 0
    log_s = jnp.where(above, jnp.log1p(jnp.where(above, x, 0)), -jnp.log1p(jnp.where(above, 0, -x)))
    return log_s - jnp.log(jnp.sum(jnp.exp(log_s), axis=-1, keepdims=True))
