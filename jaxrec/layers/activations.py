"""Activations by name, so that a configuration can hold one."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
from jax import Array

from jaxrec.errors import nearest

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "tanh", "sigmoid"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jax.numpy.tanh,
    "sigmoid": jax.nn.sigmoid,
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
