"""Images cut into square patches, each of which becomes a vector with its position added.

    x_{ij} = W patch_{ij} + b + p_{ij}

Dosovitskiy et al., An image is worth 16x16 words (2020), arXiv:2010.11929, section 3.1.
"""

import jax.numpy as jnp
from jax import Array

from jaxrec.ops.resize import bicubic


def patches(images: Array, kernel: Array, bias: Array, position: Array | None) -> Array:
    """Maps images (b X Y c) to a grid of vectors (b x y d), in the kernel's dtype.

    Args:
      images: float, of any size that patches divide.
      kernel: W, (p p c d), for patches of side p.
      bias: b, (d).
      position: p, (x y d), resized to the grid of the images; None: patches do not know where they
        are.

    Raises:
      ValueError: the images do not fit.
    """
    side, _, channels, out = kernel.shape
    fits = images.ndim == 4 and images.shape[3] == channels
    if not fits or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"patches: images must be float (b x y {channels}), got {images.dtype} {images.shape}."
        )
    batch, width, height, _ = images.shape
    if width % side or height % side or not width or not height:
        raise ValueError(
            f"patches: the sides of images must be multiples of the patch's {side}, got"
            f" {width} x {height}. Resize or pad them."
        )
    x = images.astype(kernel.dtype)
    x = x.reshape(batch, width // side, side, height // side, side, channels)
    x = jnp.swapaxes(x, 2, 3).reshape(batch, width // side, height // side, -1)
    x = (
        jnp.tensordot(x, kernel.reshape(-1, out), axes=1)
        + bias.astype(kernel.dtype)[None, None, None]
    )
    if position is None:
        return x
    position = position.astype(x.dtype)
    if position.shape != x.shape[1:]:
        position = bicubic(position, (x.shape[1], x.shape[2]))
    return x + position[None]
