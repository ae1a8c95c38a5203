"""Names that published configurations have for activations."""

from typing import Any

from jaxrec.errors import UserError, nearest
from jaxrec.layers.activations import Activation

NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""Theirs -> ours; where several of theirs mean the same, the first is the one that is written."""


def read(system: str, field: str, name: Any) -> Activation:
    """Our name for theirs.

    Raises:
      UserError: we do not have it.
    """
    if name not in NAMES:
        hint = nearest(name, NAMES) if isinstance(name, str) else ""
        raise UserError(
            f"{system}: {field} {name!r} is not supported.{hint} Known: {', '.join(NAMES)}."
        )
    return NAMES[name]


def write(name: Activation) -> str:
    """Their name for ours."""
    return next(theirs for theirs, ours in NAMES.items() if ours == name)
