"""Rotary position embedding: each pair of channels is rotated by an angle proportional to the
position.

    angle_j = position * base^(-2j/k),   (x, y) -> (x cos - y sin, y cos + x sin)

for the pairs j = 0 .. k/2 - 1 of a head of width k, in float32. Published models pair the channels
in one of two ways, which is a permutation of the weights and must be named: "interleaved" pairs
(2j, 2j + 1), "half" pairs (j, j + k/2).

Su et al., RoFormer (2021), arXiv:2104.09864.
"""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array

Pairing = Literal["interleaved", "half"]


class Rotation(NamedTuple):
    """Cosine and sine of every angle, (b t k/2) float32; computed once for all layers and loops."""

    cos: Array
    sin: Array


def rotation(positions: Array, head_width: int, base: float) -> Rotation:
    """Angles for int positions (b t) and heads of even width k.

    Raises:
      ValueError: the head width is odd.
    """
    if head_width % 2:
        raise ValueError(f"rotation: the head width must be even, got {head_width}.")
    frequency = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Array, angles: Rotation, pairing: Pairing) -> Array:
    """Rotates the channel pairs of x (b t h k) and returns it in its dtype.

    If there are angles for the first channels only, the others stay as they are.

    Raises:
      ValueError: the pairing is unknown, or there are not as many angles as x has tokens, or more
        than its heads have pairs of channels.
    """
    if pairing not in get_args(Pairing):
        raise ValueError(f"rotate: pairing must be one of {get_args(Pairing)}, got {pairing!r}.")
    width = 2 * angles.cos.shape[-1]
    if x.ndim != 4 or angles.cos.shape[1] != x.shape[1] or width > x.shape[-1]:
        raise ValueError(
            f"rotate: x must be (b t h k) and angles (b t k/2) or fewer of them, got {x.shape} and"
            f" {angles.cos.shape}."
        )
    if width < x.shape[-1]:
        turned = rotate(x[..., :width], angles, pairing)
        return jnp.concatenate([turned, x[..., width:]], axis=-1)
    cos, sin = angles.cos[:, :, None], angles.sin[:, :, None]
    axis = -1 if pairing == "interleaved" else -2
    halves = (x.shape[-1] // 2, 2) if pairing == "interleaved" else (2, x.shape[-1] // 2)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *halves)
    first, second = jnp.take(pairs, 0, axis=axis), jnp.take(pairs, 1, axis=axis)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return turned.reshape(x.shape).astype(x.dtype)
