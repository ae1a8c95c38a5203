"""The residual block of Griffin: x = x + mixer(norm(x)), then x = x + mlp(norm(x)).

De et al., Griffin: mixing gated linear recurrences with local attention (2024), arXiv:2402.19427,
section 2.1.
"""

from typing import Any

from flax import nnx
from jax import Array

from jaxrec.layers.axes import constrain
from jaxrec.layers.mlp import GatedMLP
from jaxrec.layers.norm import RMSNorm


class ResidualBlock(nnx.Module):
    """What mixes over time, and an MLP, each on its normalised input and added to the stream."""

    def __init__(self, mixer: Any, mlp: GatedMLP, width: int, *, epsilon: float = 1e-6):
        self.mixer_norm, self.mlp_norm = (
            RMSNorm(width, epsilon=epsilon, unit_offset=True) for _ in range(2)
        )
        self.mixer, self.mlp = mixer, mlp

    def __call__(self, x: Array, state: Any, **options: Any) -> tuple[Array, Any]:
        """Maps x (b t d) to (b t d); the state and the options are those of the mixer."""
        y, state = self.mixer(self.mixer_norm(x), state, **options)
        x = x + y
        x = x + self.mlp(self.mlp_norm(x))
        return constrain(x, "batch", "time", None), state
