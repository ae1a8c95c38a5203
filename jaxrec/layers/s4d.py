"""S4D: for each feature a diagonal state-space system of conjugate pairs, of which one is kept.

    x_t = A_bar x_{t-1} + B_bar u_t,   y_t = 2 Re(sum_n C_n x_{t,n}) + D u_t

with lambda = -exp(log_rate) + i frequency, B = 1, and a step dt for each feature.

Gu et al., On the parameterization and initialization of diagonal state space models (2022),
arXiv:2206.11893.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxrec.config import at_least, one_of
from jaxrec.layers.axes import over_rows, time_axis
from jaxrec.layers.scan import scan_over_time
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
from jaxrec.ops.discretize import discretize_diagonal, largest_decay
from jaxrec.ops.time import diagonal_kernel, diagonal_last_state, fft_conv

Init = Literal["lin", "inv", "legs"]
Discretization = Literal["zoh", "bilinear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4DConfig:
    """Sizes, where the eigenvalues begin, and how time is made discrete."""

    width: int  # features d
    state: int = 64  # n for each feature, counting both of each conjugate pair
    init: Init = "legs"
    discretization: Discretization = "zoh"
    dt_min: float = 1e-3  # steps begin log-uniform; 1 / dt is how many samples a feature spans
    dt_max: float = 1e-1

    def __post_init__(self) -> None:
        at_least(self, 1, "width")
        if self.state < 2 or self.state % 2:
            raise ValueError(
                f"S4DConfig: a complex state needs conjugate pairs, so state must be even and"
                f" >= 2, got {self.state}."
            )
        one_of(self, "init", get_args(Init))
        one_of(self, "discretization", get_args(Discretization))
        check_steps("S4DConfig", self.dt_min, self.dt_max)

    def build(self, *, rngs: nnx.Rngs) -> "S4D":
        """A freshly initialised layer."""
        return S4D(self, rngs=rngs)


def initial_eigenvalues(init: Init, n: int) -> np.ndarray:
    """One eigenvalue of each conjugate pair, complex128 (n/2), per unit of time."""
    if init == "legs":
        return hippo.legs_normal_plus_rank_one(n).eigenvalues[: n // 2]
    return {"lin": hippo.s4d_lin, "inv": hippo.s4d_inv}[init](n)


class S4D(nnx.Module):
    """The layer. It acts on every feature by itself; what follows must mix them."""

    def __init__(self, config: S4DConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, pairs = config.width, config.state // 2
        eigenvalues = np.broadcast_to(initial_eigenvalues(config.init, config.state), (d, pairs))
        axes = ("embed", "state")
        self.log_rate = nnx.Param(jnp.asarray(np.log(-eigenvalues.real), jnp.float32), axes=axes)
        self.frequency = nnx.Param(jnp.asarray(eigenvalues.imag, jnp.float32), axes=axes)
        self.log_step = nnx.Param(
            log_uniform_steps(rngs.params(), (d,), config.dt_min, config.dt_max), axes=("embed",)
        )
        self.output_real, self.output_imag = (
            nnx.Param(jax.random.normal(rngs.params(), (d, pairs)) * 0.5**0.5, axes=axes)
            for _ in range(2)
        )
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (d,)), axes=("embed",))

    def init_state(self, batch: int) -> Array:
        """Zero state (b d n/2), complex64."""
        return jnp.zeros((batch, self.config.width, self.config.state // 2), jnp.complex64)

    def largest_decay(self) -> Array:
        """The largest |A_bar| of all features."""
        return jnp.max(largest_decay(self._discretized(1.0)[2]))

    def _discretized(self, step_rescale: float | Array) -> tuple[Array, Array, Array, Array]:
        """lambda (d n/2), dt (d 1), A_bar (d n/2) and the factor of B (d n/2)."""
        check_one_step("S4D", step_rescale)
        rate, frequency = (x[...].astype(jnp.float32) for x in (self.log_rate, self.frequency))
        eigenvalues = lax.complex(-jnp.exp(rate), frequency)
        step = rescaled_step("S4D", self.log_step[...], step_rescale)[:, None]
        decay, gain = discretize_diagonal(eigenvalues, step, self.config.discretization)
        return eigenvalues, step, decay, gain

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
          state: (b d n/2) complex64 from `init_state` or the call before; None begins at zero.
          reset: bool (b t), True = the state that enters this step is zero.
          step_rescale: factor on every dt, for a signal sampled at another rate than in training.
          method: "conv" or "scan"; "auto" convolves when there is neither state nor reset, and no
            mesh that splits time.

        Returns:
          y (b t d) in x's dtype, and the last state.

        Raises:
          ValueError: the state belongs to another batch, "conv" was asked for with a state or
            resets, or step_rescale is not positive.
        """
        with jax.named_scope("s4d"):
            output_real, output_imag = (
                parameter[...].astype(jnp.float32)
                for parameter in (self.output_real, self.output_imag)
            )
            output = lax.complex(output_real, output_imag)
            eigenvalues, step, decay, gain = self._discretized(step_rescale)
            wide = x.astype(jnp.float32)
            # A transform over time that is split would gather the sequence; a scan sends carries.
            split = method == "auto" and time_axis(x.shape[1]) is not None
            if convolves("S4D", method, state, reset) and not split:
                if self.config.discretization == "zoh":
                    log_decay = eigenvalues * step.astype(eigenvalues.dtype)
                else:
                    # A mode that is gone after one step has no logarithm; this one is gone too.
                    log_decay = jnp.log(jnp.where(decay == 0, 1e-30, decay))
                # The kernel is made by each device: it is longer than what it is made of.
                y = over_rows(_conv, wide, log_decay, output * gain)
                last = diagonal_last_state(log_decay, gain, wide)
            else:
                state = start("S4D", state, x, self.init_state(x.shape[0]))
                driven = gain[None, None] * wide[..., None].astype(gain.dtype)
                states, last = scan_over_time(decay[None, None], driven, state, reset=reset)
                y = 2 * jnp.real(jnp.einsum("dn,btdn->btd", output, states))
            y = y + self.skip[...].astype(jnp.float32)[None, None] * wide
            return y.astype(x.dtype), last


def _conv(u: Array, log_decay: Array, weight: Array) -> Array:
    """The convolutional view: u (b t d) with the kernel 2 Re sum_n weight exp(j log_decay)."""
    return fft_conv(u, 2 * jnp.real(diagonal_kernel(log_decay, weight, u.shape[1])))
