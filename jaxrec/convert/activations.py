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
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "identity",
    "leaky_relu": "leaky_relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "hardswish": "hard_swish",
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
    """Their name for ours.

    Raises:
      UserError: they have none.
    """
    for theirs, ours in NAMES.items():
        if ours == name:
            return theirs
    raise UserError(
        f"The format has no name for the activation {name!r}. It has those of"
        f" {', '.join(dict.fromkeys(NAMES.values()))}."
    )
