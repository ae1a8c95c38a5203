"""Sines and cosines of a position, in geometric frequencies, as absolute coordinates.

    P_j = sin(p w_j),  P_{d/2 + j} = cos(p w_j),  w_j = 10000^(-j / (d/2 - 1))

The halves are concatenated, not interleaved; an odd width ends with a zero.

Vaswani et al., Attention is all you need (2017), arXiv:1706.03762, section 3.5; frequencies and
halves as in the original of the Universal Transformer (arXiv:1807.03819).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

LONGEST = 10000.0
"""The longest wavelength is so many times 2 pi."""


def sinusoid(position: Array, width: int) -> Array:
    """The coordinates (... d), float32, of positions (...), real or integer.

    Raises:
      ValueError: the width is below 2.
    """
    if width < 2:
        raise ValueError(f"sinusoid: width must be >= 2, got {width}.")
    half = width // 2
    frequency = (LONGEST ** (-np.arange(half) / max(half - 1, 1))).astype(np.float32)
    angle = position.astype(jnp.float32)[..., None] * frequency.reshape(
        (1,) * position.ndim + (half,)
    )
    parts = [jnp.sin(angle), jnp.cos(angle)]
    if width % 2:
        parts.append(jnp.zeros_like(angle[..., :1]))
    return jnp.concatenate(parts, axis=-1)
