"""Two separable convolutions with a ReLU between, where a transformer has its MLP.

    y = W_out conv_5(relu(W_up conv_3(x) + b_up)) + b_out,    conv_w depthwise over w steps

Dehghani et al., Universal transformers (2018), arXiv:1807.03819, section 2.1 (transition function);
separable: Kaiser et al. (2017), arXiv:1706.03059.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.linear import Linear, uniform
from jaxrec.ops.conv import causal_conv, centred_conv


class Windows(NamedTuple):
    """The last inputs of the two convolutions, float32, zero at the beginning."""

    first: Array  # (b w-1 d)
    second: Array  # (b w-1 e)


class SeparableConv(nnx.Module):
    """The layer, of width d and inner width e. Causal, or centred and then without a state.

    Depthwise kernels begin uniform with a variance that keeps that of their inputs.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        taps: tuple[int, int] = (3, 5),
        causal: bool = True,
        init: Initializer,
        rngs: nnx.Rngs,
    ):
        def kernel(taps: int, channels: int, axis: str) -> nnx.Param:
            values = uniform((3 / taps) ** 0.5)(rngs.params(), (taps, channels), jnp.float32)
            return nnx.Param(values, axes=("conv", axis))

        self.first_kernel = kernel(taps[0], width, "embed")
        self.second_kernel = kernel(taps[1], inner, "mlp")
        self.up = Linear(width, inner, init=init, axes=("embed", "mlp"), bias=True, rngs=rngs)
        self.out = Linear(inner, width, init=init, axes=("mlp", "embed"), bias=True, rngs=rngs)
        self.causal = causal

    def init_state(self, batch: int) -> Windows:
        """The windows before the first step."""
        taps_and_channels = (self.first_kernel.shape, self.second_kernel.shape)
        return Windows(*(jnp.zeros((batch, w - 1, e)) for w, e in taps_and_channels))

    def __call__(
        self,
        x: Array,
        state: Windows | None = None,
        *,
        reset: Array | None = None,
        is_token: Array | None = None,
    ) -> tuple[Array, Windows]:
        """Maps x (b t d) to (b t d).

        Args:
          x: activations.
          state: windows so far; None begins anew.
          reset: bool (b t), where causal: no input from before a True reaches this step or later.
          is_token: bool (b t), where not causal: no padding reaches its neighbours.

        Raises:
          ValueError: there is a state or a reset, and the convolutions are not causal.
        """
        if not self.causal and not (state is None and reset is None):
            raise ValueError("SeparableConv: without causality there are no states and no resets.")
        windows = self.init_state(x.shape[0]) if state is None else state

        def conv(x: Array, kernel: nnx.Param, window: Array) -> tuple[Array, Array]:
            bias = jnp.zeros(x.shape[2], x.dtype)
            if is_token is not None:
                x = jnp.where(is_token[..., None], x, jnp.zeros((), x.dtype))
            if not self.causal:
                return centred_conv(x, kernel[...], bias), window
            return causal_conv(x, kernel[...], bias, window, reset)

        with jax.named_scope("separable_conv"):
            y, first = conv(x, self.first_kernel, windows.first)
            y, second = conv(jax.nn.relu(self.up(y)), self.second_kernel, windows.second)
            return self.out(y), Windows(first, second)
