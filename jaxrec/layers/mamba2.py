"""The mixer of Mamba-2: a matrix state per head, which decays by one number per step.

    [z ; x, b, c ; r] = W_in u;   x, b, c = act(conv(x, b, c));   dt = softplus(r + bias)
    S_t = exp(dt_t a) S_{t-1} + b_t (dt_t x_t)^T,   y_t = S_t^T c_t + D x_t
    out = W_out norm(y silu(z))

with a = -exp(log_rate) for each of h heads, x of p channels a head, and b and c of n numbers shared
by the heads of a group.

Dao & Gu, Transformers are SSMs (2024), arXiv:2405.21060, sections 6 and 7.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.activations import silu
from jaxrec.layers.linear import Linear, uniform
from jaxrec.layers.mamba import log_uniform_step_bias
from jaxrec.layers.norm import RMSNorm
from jaxrec.layers.scan import matrix_scan_over_time
from jaxrec.ops.conv import causal_conv


class Mamba2State(NamedTuple):
    """What a mixer carries from one call to the next."""

    window: Array  # (b w-1 hp+2gn) float32: the last inputs of the convolution
    hidden: Array  # (b h n p) float32: S


class Mamba2(nnx.Module):
    """The mixer, of width d, with h heads of p channels and g groups of n states.

    `activation` follows the convolution; `bias` is that of the first and the last projection; step
    sizes are kept within `step_limit`. Rates begin at -1 .. -h, weights uniform within
    1 / sqrt(inputs), those of the last projection times `out_scale`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        state_size: int,
        *,
        groups: int = 1,
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        activation: Callable[[Array], Array] = silu,
        step_limit: tuple[float, float] = (0.0, float("inf")),
        norm_epsilon: float = 1e-5,
        out_scale: float = 1.0,
        step_bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        inner, mixed = heads * head_width, heads * head_width + 2 * groups * state_size
        self.input = Linear(
            width,
            inner + mixed + heads,
            init=uniform(width**-0.5),
            axes=("embed", "mlp"),
            bias=bias,
            rngs=rngs,
        )
        kernel = uniform(conv_width**-0.5)(rngs.params(), (conv_width, mixed))
        self.conv_kernel = nnx.Param(kernel, axes=("conv", "mlp"))
        self.conv_bias = nnx.Param(jnp.zeros(mixed), axes=("mlp",)) if conv_bias else None
        step_bias_init = step_bias_init or log_uniform_step_bias(1e-3, 1e-1, 1e-4)
        self.step_bias = nnx.Param(step_bias_init(rngs.params(), (heads,)), axes=("heads",))
        rate = jnp.arange(1, heads + 1, dtype=jnp.float32)
        self.log_rate = nnx.Param(jnp.log(rate), axes=("heads",))
        self.skip = nnx.Param(jnp.ones(heads), axes=("heads",))
        self.norm = RMSNorm(inner, epsilon=norm_epsilon, groups=groups)
        self.out = Linear(
            inner,
            width,
            init=uniform(out_scale * inner**-0.5),
            axes=("mlp", "embed"),
            bias=bias,
            rngs=rngs,
        )
        self.head_width, self.state_size, self.groups = head_width, state_size, groups
        self.step_limit, self.activation = step_limit, activation

    def init_state(self, batch: int) -> Mamba2State:
        """Zero state, float32."""
        width, mixed = self.conv_kernel.shape
        heads = self.log_rate.shape[0]
        return Mamba2State(
            jnp.zeros((batch, width - 1, mixed)),
            jnp.zeros((batch, heads, self.state_size, self.head_width)),
        )

    def __call__(
        self, x: Array, state: Mamba2State, *, reset: Array | None = None
    ) -> tuple[Array, Mamba2State]:
        """Maps x (b t d) to (b t d).

        Args:
          x: input (b t d).
          state: from `init_state` or the call before.
          reset: bool (b t), True where a document begins: neither the state nor the convolution
            reaches back across it.
        """
        with jax.named_scope("mamba2"):
            heads, mixed = self.log_rate.shape[0], self.conv_kernel.shape[1]
            inner = heads * self.head_width
            gate, u, step = jnp.split(self.input(x), [inner, inner + mixed], axis=-1)
            bias = jnp.zeros(mixed) if self.conv_bias is None else self.conv_bias[...]
            u, window = causal_conv(u, self.conv_kernel[...], bias, state.window, reset)
            u, b, c = jnp.split(
                self.activation(u), [inner, inner + self.groups * self.state_size], axis=-1
            )
            # What is normalised at the end may be small: no digits are dropped before.
            u = u.reshape(*u.shape[:2], heads, self.head_width).astype(jnp.float32)
            step_bias = self.step_bias[...].astype(jnp.float32)[None, None]
            dt = jnp.clip(jax.nn.softplus(step.astype(jnp.float32) + step_bias), *self.step_limit)
            rate = -jnp.exp(self.log_rate[...].astype(jnp.float32))
            y, hidden = matrix_scan_over_time(
                c.reshape(*c.shape[:2], self.groups, self.state_size),
                b.reshape(*b.shape[:2], self.groups, self.state_size),
                u * dt[..., None],
                dt * rate[None, None],
                state.hidden,
                reset=reset,
            )
            y = y + self.skip[...].astype(jnp.float32)[None, None, :, None] * u
            y = y.reshape(gate.shape) * silu(gate.astype(jnp.float32))
            return self.out(self.norm(y)), Mamba2State(window, hidden)
