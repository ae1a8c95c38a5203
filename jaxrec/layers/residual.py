"""The residual block of most recurrent models: x = x + mixer(norm(x)), then x = x + mlp(norm(x)).

De et al., Griffin: mixing gated linear recurrences with local attention (2024), arXiv:2402.19427,
section 2.1. Mamba's blocks have no MLP.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import Array

from jaxrec.layers.axes import constrain


class ResidualBlock(nnx.Module):
    """What mixes over time and, unless it is None, what mixes channels, each on its normalised
    input and added to the stream, whose dtype stays. `norm` makes one norm.
    """

    def __init__(self, mixer: Any, mlp: Any, *, norm: Callable[[], Any]):
        self.mixer_norm, self.mixer = norm(), mixer
        self.mlp_norm: Any = None if mlp is None else norm()
        self.mlp: Any = mlp

    def init_state(self, batch: int) -> Any:
        """That of the mixer."""
        return self.mixer.init_state(batch)

    def measure(self, x: Array, state: Any, **options: Any) -> dict[str, Array]:
        """What the mixer says of itself on these inputs; nothing if it has no `measure`."""
        if not hasattr(self.mixer, "measure"):
            return {}
        return self.mixer.measure(self.mixer_norm(x), state, **options)

    def __call__(self, x: Array, state: Any, **options: Any) -> tuple[Array, Any]:
        """Maps x (b t d) to (b t d); the state and the options are those of the mixer."""
        y, state = self.mixer(self.mixer_norm(x), state, **options)
        x = x + y.astype(x.dtype)
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x)).astype(x.dtype)
        return constrain(x, "batch", "time", None), state
