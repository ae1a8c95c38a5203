"""A short causal convolution with a gate, the local mixer of hybrids with linear attention.

    y = W_out (act(W_gate x) * conv(W_in x))

Arora et al., Zoology: measuring and improving recall in efficient language models (2023),
arXiv:2312.04927 (BaseConv).
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.activations import silu
from jaxrec.layers.linear import Linear, truncated_normal
from jaxrec.ops.conv import causal_conv


class GatedConv(nnx.Module):
    """The mixer, of width d with e inner channels."""

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        conv_width: int = 3,
        activation: Callable[[Array], Array] = silu,
        init: Initializer,
        out_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.gate, self.input = (
            Linear(width, inner, init=init, axes=("embed", "mlp"), rngs=rngs) for _ in range(2)
        )
        self.out = Linear(inner, width, init=out_init or init, axes=("mlp", "embed"), rngs=rngs)
        kernel = truncated_normal(conv_width**-0.5)(rngs.params(), (conv_width, inner))
        self.conv_kernel = nnx.Param(kernel, axes=("conv", "mlp"))
        self.conv_bias = nnx.Param(jnp.zeros(inner), axes=("mlp",))
        self.activation = activation

    def init_state(self, batch: int) -> Array:
        """The last inputs of the convolution (b w-1 e), float32, zero at the beginning."""
        width, inner = self.conv_kernel.shape
        return jnp.zeros((batch, width - 1, inner))

    def __call__(
        self, x: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, Array]:
        """Maps x (b t d) to (b t d); no input from before a True of `reset`, bool (b t), reaches
        this step or later ones.
        """
        gate = self.activation(self.gate(x))
        inner, state = causal_conv(
            self.input(x), self.conv_kernel[...], self.conv_bias[...], state, reset
        )
        return self.out(gate * inner), state
