"""The linear state-space layer (LSSL): one system with a dense HiPPO matrix for each feature.

    x_t = A_bar x_{t-1} + B_bar u_t,   y_t = C x_t + D u_t

with A_bar, B_bar the generalised bilinear discretisation of A (n n) and B (n), which all features
share, at the feature's own step dt, and with m outputs for each feature.

Gu et al., Combining recurrent, convolutional, and continuous-time models with linear state-space
layers (2021), arXiv:2110.13985.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxrec.config import at_least
from jaxrec.layers.axes import over_rows, time_axis
from jaxrec.layers.ssm import (
    View,
    check_one_step,
    check_steps,
    convolves,
    log_uniform_steps,
    rescaled_step,
    start,
)
from jaxrec.ops import hippo
from jaxrec.ops.discretize import generalised_bilinear, largest_decay
from jaxrec.ops.time import dense_conv, dense_scan, sharded_dense_conv


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSSLConfig:
    """Sizes and what is trained. With neither A nor dt trained it is LSSL-f of the paper."""

    width: int  # features d
    state: int  # n, for each feature
    outputs: int = 1  # m, for each feature
    alpha: float = 0.5  # of the generalised bilinear transform: 0 Euler, 1/2 bilinear, 1 backward
    train_transition: bool = False  # A and B
    train_step: bool = False  # dt
    dt_min: float = 1e-3  # steps begin log-uniform; 1 / dt is how many samples a feature spans
    dt_max: float = 1e-1

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "state", "outputs")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"LSSLConfig: alpha must lie in [0, 1], got {self.alpha}.")
        check_steps("LSSLConfig", self.dt_min, self.dt_max)

    def build(self, *, rngs: nnx.Rngs) -> "LSSL":
        """A freshly initialised layer."""
        return LSSL(self, rngs=rngs)


class LSSL(nnx.Module):
    """The layer without what usually follows it, a nonlinearity and a map from d * m to d."""

    def __init__(self, config: LSSLConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, m, n = config.width, config.outputs, config.state
        a, b = (jnp.asarray(x, jnp.float32) for x in hippo.legs(n))
        trained = config.train_transition
        self.transition = nnx.Param(a, axes=("state", "state")) if trained else None
        self.input = nnx.Param(b, axes=("state",)) if trained else None
        self.log_step = nnx.Param(
            log_uniform_steps(rngs.params(), (d,), config.dt_min, config.dt_max), axes=("embed",)
        )
        # Noise of unit size leaves about sqrt(dt) in every coefficient of a LegS state.
        output = jax.random.normal(rngs.params(), (d, m, n))
        self.output = nnx.Param(output, axes=("embed", None, "state"))
        self.skip = nnx.Param(jnp.ones((d, m)), axes=("embed", None))

    def init_state(self, batch: int) -> Array:
        """Zero state (b d n), float32."""
        return jnp.zeros((batch, self.config.width, self.config.state))

    def discretized(self, step_rescale: float | Array = 1.0) -> tuple[Array, Array]:
        """A_bar (d n n) and B_bar (d n), float32."""
        check_one_step("LSSL", step_rescale)
        if self.transition is None or self.input is None:
            a, b = (jnp.asarray(x, jnp.float32) for x in hippo.legs(self.config.state))
        else:
            a, b = (x[...].astype(jnp.float32) for x in (self.transition, self.input))
        log_step = self.log_step[...]
        if not self.config.train_step:
            log_step = lax.stop_gradient(log_step)
        return generalised_bilinear(
            a, b, rescaled_step("LSSL", log_step, step_rescale), self.config.alpha
        )

    def largest_decay(self) -> Array:
        """The largest |eigenvalue of A_bar| of all features."""
        return jnp.max(largest_decay(self.discretized()[0], dense=True))

    def __call__(
        self,
        x: Array,
        state: Array | None = None,
        *,
        reset: Array | None = None,
        step_rescale: float | Array = 1.0,
        method: View = "auto",
    ) -> tuple[Array, Array]:
        """Runs over x.

        Args:
          x: input (b t d).
          state: (b d n) float32 from `init_state` or the call before; None begins at zero.
          reset: bool (b t), True = the state that enters this step is zero.
          step_rescale: factor on every dt, for a signal sampled at another rate than in training.
          method: "conv" or "scan"; "auto" convolves when there is neither state nor reset. Over a
            mesh that splits time the convolution sends states only; the scan is left to the
            compiler, which gathers the sequence.

        Returns:
          y (b t d m) in x's dtype, and the last state.

        Raises:
          ValueError: the state belongs to another batch, "conv" was asked for with a state or
            resets, or step_rescale is not positive.
        """
        with jax.named_scope("lssl"):
            a_bar, b_bar = self.discretized(step_rescale)
            output, wide = self.output[...].astype(jnp.float32), x.astype(jnp.float32)
            if convolves("LSSL", method, state, reset):
                axis = time_axis(x.shape[1])
                if axis is None:
                    y, last = over_rows(_conv, wide, a_bar, b_bar, output)
                else:
                    y, last = sharded_dense_conv(a_bar, b_bar, output, wide, axis=axis)
            else:
                state = start("LSSL", state, x, self.init_state(x.shape[0]))
                y, last = dense_scan(a_bar, b_bar, output, wide, state, reset)
            y = y + self.skip[...].astype(jnp.float32)[None, None] * wide[..., None]
            return y.astype(x.dtype), last


def _conv(u: Array, a_bar: Array, b_bar: Array, output: Array) -> tuple[Array, Array]:
    """`dense_conv`, the rows in front."""
    return dense_conv(a_bar, b_bar, output, u)
