"""The real-gated linear recurrent unit (RG-LRU) and the recurrent block of Griffin around it.

    r_t = sigmoid(W_a x_t),  i_t = sigmoid(W_x x_t),  log a_t = -8 r_t softplus(Lambda)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t)

with W_a, W_x block-diagonal, and no square root where a document begins (a_t = 0 there).

De et al., Griffin: mixing gated linear recurrences with local attention (2024), arXiv:2402.19427,
section 2.4.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer

from jaxrec.config import multiple_of
from jaxrec.layers.linear import BlockLinear, Linear, truncated_normal
from jaxrec.layers.scan import scan_over_time
from jaxrec.ops import notes
from jaxrec.ops.conv import causal_conv

GATE_SHARPNESS = 8.0  # c of the paper
LARGEST_SQRT_SLOPE = 1000.0


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """sqrt(x) whose slope is cut at 1000: 1 - a^2 reaches 0 when a gate closes, and sqrt is steep
    there.
    """
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    slope = jax.lax.rsqrt(jnp.maximum(4.0 * x, LARGEST_SQRT_SLOPE**-2))
    return jnp.sqrt(x), slope * dx


@dataclasses.dataclass(frozen=True, kw_only=True)
class RGLRUConfig:
    """Sizes of the recurrence alone. It knows nothing of time steps."""

    width: int
    heads: int = 1  # blocks of the gates' matrices

    def __post_init__(self) -> None:
        multiple_of(self, "heads", "width")

    def build(self, *, rngs: nnx.Rngs) -> "RGLRU":
        """A freshly initialised layer."""
        return RGLRU(self.width, self.heads, rngs=rngs)


class RGLRU(nnx.Module):
    """The recurrence alone: gates, decay, scan."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.config = RGLRUConfig(width=width, heads=heads)
        init = truncated_normal((heads / width) ** 0.5)
        self.recurrence_gate = BlockLinear(width, heads, init=init, rngs=rngs)
        self.input_gate = BlockLinear(width, heads, init=init, rngs=rngs)
        # a at r = 1 is u^8 for u^2 uniform in [0.9^2, 0.999^2]: softplus(Lambda) = -log(u).
        squared = jax.random.uniform(rngs.params(), (width,), minval=0.9**2, maxval=0.999**2)
        self.decay = nnx.Param(jnp.log(jnp.expm1(-0.5 * jnp.log(squared + 1e-8))), axes=("mlp",))

    def init_state(self, batch: int) -> Array:
        """Zero state (b e), float32."""
        return jnp.zeros((batch, self.decay.shape[0]))

    def __call__(
        self, x: Array, state: Array, *, reset: Array | None = None
    ) -> tuple[Array, Array]:
        """Runs over x (b t e) from the state (b e).

        Args:
          x: input (b t e).
          state: h before the first step, (b e) float32.
          reset: bool (b t), True where a document begins: the state that enters is zero and the
            input is not scaled by sqrt(1 - a^2). A stream that begins must say so, or its first
            input is scaled.

        Returns:
          h (b t e) in x's dtype, and the last state.
        """
        with jax.named_scope("rglru"):
            r = jax.nn.sigmoid(self.recurrence_gate(x).astype(jnp.float32))
            i = jax.nn.sigmoid(self.input_gate(x).astype(jnp.float32))
            notes.note("gate", r)
            notes.note("gate", i)
            log_a = (
                -GATE_SHARPNESS
                * r
                * jax.nn.softplus(self.decay[...].astype(jnp.float32))[None, None]
            )
            multiplier = bounded_sqrt(-jnp.expm1(2.0 * log_a))
            if reset is not None:
                multiplier = jnp.where(reset[..., None], 1.0, multiplier)
            h, last = scan_over_time(
                jnp.exp(log_a), multiplier * i * x.astype(jnp.float32), state, reset=reset
            )
            return h.astype(x.dtype), last


class RecurrentState(NamedTuple):
    """What a recurrent block carries from one call to the next."""

    window: Array  # (b w-1 e) float32: the last inputs of the convolution
    hidden: Array  # (b e) float32: the RG-LRU state


class RecurrentBlock(nnx.Module):
    """y = W_out (act(W_y x) * RGLRU(conv(W_x x))) with a short causal convolution (Griffin, figure
    2).
    """

    def __init__(
        self,
        width: int,
        inner: int,
        heads: int,
        *,
        conv_width: int = 4,
        activation: Callable[[Array], Array] = jax.nn.gelu,
        init: Initializer,
        out_init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.gate = Linear(width, inner, init=init, axes=("embed", "mlp"), bias=True, rngs=rngs)
        self.input = Linear(width, inner, init=init, axes=("embed", "mlp"), bias=True, rngs=rngs)
        self.out = Linear(
            inner, width, init=out_init or init, axes=("mlp", "embed"), bias=True, rngs=rngs
        )
        kernel = truncated_normal((1 / conv_width) ** 0.5)(rngs.params(), (conv_width, inner))
        self.conv_kernel = nnx.Param(kernel, axes=(None, "mlp"))
        self.conv_bias = nnx.Param(jnp.zeros(inner), axes=("mlp",))
        self.recurrence = RGLRU(inner, heads, rngs=rngs)

    def init_state(self, batch: int) -> RecurrentState:
        """Zero state, float32."""
        width, inner = self.conv_kernel.shape
        return RecurrentState(
            jnp.zeros((batch, width - 1, inner)), self.recurrence.init_state(batch)
        )

    def __call__(
        self, x: Array, state: RecurrentState, *, reset: Array | None = None
    ) -> tuple[Array, RecurrentState]:
        """Maps x (b t d) to (b t d); `reset` as in `RGLRU`, also cutting the convolution."""
        gate = self.activation(self.gate(x))
        inner, window = causal_conv(
            self.input(x), self.conv_kernel[...], self.conv_bias[...], state.window, reset
        )
        inner, hidden = self.recurrence(inner, state.hidden, reset=reset)
        return self.out(gate * inner), RecurrentState(window, hidden)
