"""The mixer of Mamba: a state-space recurrence whose step size, input and output maps depend on the
input.

    [u ; z] = W_in x;   u = act(conv(u));   [r ; b ; c] = W_s u;   dt = softplus(W_dt r + bias)
    h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t,   y_t = c_t . h_t + D u_t,   out = W_out (y act(z))

with a = -exp(log_rate), one row of n numbers for each of e inner channels.

Gu & Dao, Mamba: linear-time sequence modeling with selective state spaces (2023), arXiv:2312.00752,
sections 3.2 to 3.6.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.layers.activations import silu
from jaxrec.layers.linear import Linear, uniform
from jaxrec.layers.scan import selective_scan_over_time
from jaxrec.ops.conv import causal_conv


class MambaState(NamedTuple):
    """What a mixer carries from one call to the next."""

    window: Array  # (b w-1 e) float32: the last inputs of the convolution
    hidden: Array  # (b e n) float32: h


def log_uniform_step_bias(low: float, high: float, floor: float) -> Initializer:
    """Biases whose softplus, the step size dt, is log-uniform between `low` and `high` and at least
    `floor`.
    """

    def init(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        low_log, high_log = jnp.log(jnp.asarray(low, dtype)), jnp.log(jnp.asarray(high, dtype))
        draws = jax.random.uniform(key, shape, dtype, low_log, high_log, out_sharding=out_sharding)
        step = jnp.maximum(jnp.exp(draws), floor)
        return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus

    return init


class Mamba(nnx.Module):
    """The mixer, of width d, with e inner channels of n states each.

    Step sizes come through a bottleneck of `rank` channels. `activation` follows the convolution;
    that of the gate is silu always, as in the original. `bias` is that of the first and the last
    projection. Rates begin at -1 .. -n, weights uniform within 1 / sqrt(inputs), those of the last
    projection times `out_scale`.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        state_size: int,
        rank: int,
        *,
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        activation: Callable[[Array], Array] = silu,
        out_scale: float = 1.0,
        step_init: Initializer | None = None,
        step_bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.input = Linear(
            width,
            (2, inner),
            init=uniform(width**-0.5),
            axes=("embed", None, "mlp"),
            bias=bias,
            rngs=rngs,
        )
        kernel = uniform(conv_width**-0.5)(rngs.params(), (conv_width, inner))
        self.conv_kernel = nnx.Param(kernel, axes=("conv", "mlp"))
        self.conv_bias = nnx.Param(jnp.zeros(inner), axes=("mlp",)) if conv_bias else None
        self.select = Linear(
            inner,
            rank + 2 * state_size,
            init=uniform(inner**-0.5),
            axes=("mlp", None),
            rngs=rngs,
        )
        self.step = Linear(
            rank,
            inner,
            init=step_init or uniform(rank**-0.5),
            axes=(None, "mlp"),
            bias=True,
            bias_init=step_bias_init or log_uniform_step_bias(1e-3, 1e-1, 1e-4),
            rngs=rngs,
        )
        rate = jnp.arange(1, state_size + 1, dtype=jnp.float32)
        self.log_rate = nnx.Param(
            jnp.log(jnp.broadcast_to(rate[None], (inner, state_size))), axes=("mlp", "state")
        )
        self.skip = nnx.Param(jnp.ones(inner), axes=("mlp",))
        self.out = Linear(
            inner,
            width,
            init=uniform(out_scale * inner**-0.5),
            axes=("mlp", "embed"),
            bias=bias,
            rngs=rngs,
        )
        self.rank, self.activation = rank, activation

    def init_state(self, batch: int) -> MambaState:
        """Zero state, float32."""
        width, inner = self.conv_kernel.shape
        return MambaState(
            jnp.zeros((batch, width - 1, inner)),
            jnp.zeros((batch, inner, self.log_rate.shape[1])),
        )

    def __call__(
        self, x: Array, state: MambaState, *, reset: Array | None = None
    ) -> tuple[Array, MambaState]:
        """Maps x (b t d) to (b t d).

        Args:
          x: input (b t d).
          state: from `init_state` or the call before.
          reset: bool (b t), True where a document begins: neither the state nor the convolution
            reaches back across it.
        """
        with jax.named_scope("mamba"):
            both = self.input(x)
            u, gate = both[:, :, 0], both[:, :, 1]
            bias = jnp.zeros(u.shape[-1]) if self.conv_bias is None else self.conv_bias[...]
            u, window = causal_conv(u, self.conv_kernel[...], bias, state.window, reset)
            u = self.activation(u)
            low, b, c = jnp.split(
                self.select(u), [self.rank, self.rank + self.log_rate.shape[1]], axis=-1
            )
            dt = jax.nn.softplus(self.step(low).astype(jnp.float32))
            a = -jnp.exp(self.log_rate[...].astype(jnp.float32))
            y, hidden = selective_scan_over_time(u, dt, a, b, c, state.hidden, reset=reset)
            y = (y + self.skip[...].astype(u.dtype)[None, None] * u) * silu(gate)
            return self.out(y), MambaState(window, hidden)
