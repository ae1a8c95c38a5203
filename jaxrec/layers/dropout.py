"""Dropout with the key as an argument.

Srivastava et al., Dropout: a simple way to prevent neural networks from overfitting (2014).
"""

import jax
import jax.numpy as jnp
from jax import Array


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """x with each number zeroed with probability `rate`, the others grown by 1 / (1 - rate); x
    itself without a key.
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)
