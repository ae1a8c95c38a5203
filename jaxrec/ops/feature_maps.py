"""Feature maps of linear attention: vectors whose products stand for the exponential of softmax."""

import math

import jax.numpy as jnp
from jax import Array


def taylor(x: Array) -> Array:
    """phi(x) = [1, x / d^(1/4), vec(x x^T) / sqrt(2 d)] of x (... d): (... 1 + d + d^2), float32.

    phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(d): the exponential of softmax attention
    to second order, which is never below 1/2. Note that phi(0) is not 0: what must not be read is
    masked after the map.

    Arora et al., Simple linear attention language models balance the recall-throughput tradeoff
    (2024), arXiv:2402.18668 (Based).
    """
    width = x.shape[-1]
    wide = x.astype(jnp.float32)
    squares = wide[..., :, None] * wide[..., None, :] / math.sqrt(2 * width)
    return jnp.concatenate(
        [
            jnp.ones_like(wide[..., :1]),
            wide / width**0.25,
            squares.reshape(*x.shape[:-1], width**2),
        ],
        axis=-1,
    )
