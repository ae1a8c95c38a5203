"""Normalisation over the channels; statistics in float32 whatever the activations are."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + epsilon) * scale (+ bias).

    `scale=False` leaves the scale out. With `unit_offset` the parameter is the deviation of the
    scale from 1, and begins at 0. With several groups the mean is over each of so many equal parts
    of the channels.

    Zhang & Sennrich, Root mean square layer normalization (2019), arXiv:1910.07467.
    """

    def __init__(
        self,
        width: int,
        *,
        epsilon: float = 1e-6,
        unit_offset: bool = False,
        groups: int = 1,
        scale: bool = True,
        bias: bool = False,
    ):
        if width % groups:
            raise ValueError(f"RMSNorm: width {width} does not divide into {groups} groups.")
        ones = jnp.zeros(width) if unit_offset else jnp.ones(width)
        self.scale = nnx.Param(ones, axes=(None,)) if scale else None
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,)) if bias else None
        self.epsilon = epsilon
        self.unit_offset = unit_offset
        self.groups = groups

    def __call__(self, x: Array) -> Array:
        """Normalises (... d) over d; returns x's dtype."""
        wide = _in_groups(x.astype(jnp.float32), self.groups)
        normed = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        y = normed.reshape(x.shape).astype(x.dtype)
        if self.scale is not None:
            scale = self.scale[...] + 1 if self.unit_offset else self.scale[...]
            y = y * _spread(scale, x)
        return y if self.bias is None else y + _spread(self.bias[...], x)


class LayerNorm(nnx.Module):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale (+ bias).

    With several groups mean and variance are over each of so many equal parts of the channels.

    Ba, Kiros & Hinton, Layer normalization (2016), arXiv:1607.06450.
    """

    def __init__(self, width: int, *, epsilon: float = 1e-5, bias: bool = True, groups: int = 1):
        if width % groups:
            raise ValueError(f"LayerNorm: width {width} does not divide into {groups} groups.")
        self.scale = nnx.Param(jnp.ones(width), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(width), axes=(None,)) if bias else None
        self.epsilon = epsilon
        self.groups = groups

    def __call__(self, x: Array) -> Array:
        """Normalises (... d) over d; returns x's dtype."""
        wide = _in_groups(x.astype(jnp.float32), self.groups)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.epsilon)
        y = normed.reshape(x.shape).astype(x.dtype) * _spread(self.scale[...], x)
        return y if self.bias is None else y + _spread(self.bias[...], x)


def _in_groups(x: Array, groups: int) -> Array:
    """(... d) to (... groups d/groups); one group stays (... d), since sums of products beside an
    axis of size 1 take XLA on CPU ten times as long.
    """
    return x if groups == 1 else x.reshape(*x.shape[:-1], groups, -1)


def _spread(vector: Array, x: Array) -> Array:
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)
