"""Feed-forward layers, gated and not."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.activations import silu
from jaxrec.layers.linear import Linear


class GatedMLP(nnx.Module):
    """y = W_out (act(W_gate x) * (W_up x)).

    Shazeer, GLU variants improve transformer (2020), arXiv:2002.05202. With silu this is SwiGLU,
    with gelu GeGLU.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        init: Initializer,
        up_init: Initializer | None = None,
        out_init: Initializer | None = None,
        activation: Callable[[Array], Array] = silu,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.gate = Linear(width, inner, init=init, axes=("embed", "mlp"), bias=bias, rngs=rngs)
        self.up = Linear(
            width, inner, init=up_init or init, axes=("embed", "mlp"), bias=bias, rngs=rngs
        )
        self.out = Linear(
            inner, width, init=out_init or init, axes=("mlp", "embed"), bias=bias, rngs=rngs
        )
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """Maps (b t d) to (b t d) through the inner width."""
        with jax.named_scope("mlp"):
            return self.out(self.activation(self.gate(x)) * self.up(x))


class MLP(nnx.Module):
    """y = W_out act(W_up x + b_up) + b_out."""

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        init: Initializer,
        activation: Callable[[Array], Array],
        rngs: nnx.Rngs,
    ):
        self.up = Linear(width, inner, init=init, axes=("embed", "mlp"), bias=True, rngs=rngs)
        self.out = Linear(inner, width, init=init, axes=("mlp", "embed"), bias=True, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """Maps (b t d) to (b t d) through the inner width."""
        with jax.named_scope("mlp"):
            return self.out(self.activation(self.up(x)))
