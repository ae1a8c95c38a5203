"""The nonlinearities that follow a state-space layer.

Smith et al., S5 (2022), arXiv:2208.04933, appendix G.1.
"""

from typing import Literal

import jax
from flax import nnx
from jax import Array

from jaxrec.layers.linear import Linear

Activation = Literal["gelu", "full_glu", "half_glu1", "half_glu2"]


class GatedActivation(nnx.Module):
    """What follows a mixer, with g = gelu(x).

        gelu g or W1 g;   full_glu W1 g * sigmoid(W2 g);
        half_glu1 g * sigmoid(W2 g);   half_glu2 x * sigmoid(W2 g)

    gelu has its W1 where the mixer acts on every feature by itself or has several outputs for each.
    """

    def __init__(self, kind: Activation, inputs: int, width: int, *, mix: bool, rngs: nnx.Rngs):
        self.kind = kind
        init, axes = jax.nn.initializers.lecun_normal(), ("embed", "mlp")

        def linear() -> Linear:
            return Linear(inputs, width, init=init, axes=axes, bias=True, rngs=rngs)

        self.value = linear() if kind == "full_glu" or (kind == "gelu" and mix) else None
        self.gate = linear() if kind != "gelu" else None

    def __call__(self, x: Array) -> Array:
        """Maps (b t e) to (b t d)."""
        g = jax.nn.gelu(x)
        y = x if self.kind == "half_glu2" else g
        if self.value is not None:
            y = self.value(g)
        return y if self.gate is None else y * jax.nn.sigmoid(self.gate(g))
