"""Activations by name, so that a configuration can hold one."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxrec.errors import nearest

Activation = Literal[
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "tanh",
    "sigmoid",
    "identity",
    "leaky_relu",
    "selu",
    "elu",
    "softplus",
    "exp",
    "half_sigmoid",
    "relu2",
    "relu6",
    "mish",
    "quick_gelu",
    "hard_swish",
]


@jax.custom_jvp
def silu(x: Array) -> Array:
    """x / (1 + exp(-x)), in float32 at least.

    The division comes last, other than in `jax.nn.silu`: XLA on CPU computes a division once, but
    repeats a product, with the layer before it, in every operation that reads it.

    Elfwing et al., Sigmoid-weighted linear units (2017), arXiv:1702.03118.
    """
    wide = _widened(x)
    return (wide / (1 + jnp.exp(-wide))).astype(x.dtype)


@silu.defjvp
def _silu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """d silu = s (1 + x (1 - s)) dx, s = sigmoid(x), which is finite where exp(-x) is not."""
    (x,), (dx,) = primals, tangents
    wide = _widened(x)
    s = jax.nn.sigmoid(wide)
    return silu(x), (s * (1 + wide * (1 - s))).astype(x.dtype) * dx


def _widened(x: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _identity(x: Array) -> Array:
    return x


def _half_sigmoid(x: Array) -> Array:
    """A gate that at most half opens."""
    return 0.5 * jax.nn.sigmoid(x)


def _relu2(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


def _quick_gelu(x: Array) -> Array:
    """Gelu with a logistic curve in place of the normal distribution."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "identity": _identity,
    "leaky_relu": jax.nn.leaky_relu,  # 0.01 x below zero
    "selu": jax.nn.selu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "exp": jnp.exp,
    "half_sigmoid": _half_sigmoid,
    "relu2": _relu2,
    "relu6": jax.nn.relu6,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "hard_swish": jax.nn.hard_swish,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The function of a name.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation: there is no {name!r}.{nearest(name, ACTIVATIONS)}"
            f" Known: {', '.join(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]
