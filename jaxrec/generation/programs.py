"""How the programs of samplers take a model and a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jaxrec.layers.apart import for_decoding


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["structure"]
)
@dataclasses.dataclass(frozen=True)
class FlatModel:
    """A model as a flat list of weights, which costs the host far less per call than a module."""

    weights: list[Array]
    structure: Any

    @classmethod
    def of(cls, model: Any) -> "FlatModel":
        """The same model, flat."""
        return cls(*jax.tree.flatten(model))

    @classmethod
    def for_decoding(cls, model: Any) -> "FlatModel":
        """The same for steps on a single token or a few; it begins no state."""
        return cls.of(for_decoding(model))

    def module(self) -> Any:
        """The module again."""
        return jax.tree.unflatten(self.structure, self.weights)


def over_rows(function: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """`function` of one row mapped over so many; all arguments are (b ...).

    A single row is not mapped: a cache that is written at one place is written in place, at a place
    of each row it is copied.
    """
    if rows > 1:
        return jax.vmap(function)

    def alone(*arguments: Any) -> Any:
        inner = jax.tree.map(lambda leaf: leaf[0], arguments)
        return jax.tree.map(lambda leaf: leaf[None], function(*inner))

    return alone
