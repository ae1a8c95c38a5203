"""S5: one diagonal state-space system with many inputs and outputs, run by a parallel scan.

    x_t = A_bar x_{t-1} + B_bar u_t,   y_t = k Re(C x_t) + D u_t

with complex eigenvalues lambda (n), B (n d), C (d n), real D (d), a step dt for each state, and k =
2 when one state stands for a conjugate pair, else 1. A bidirectional layer has a second C for a
scan that runs from the end.

Smith et al., Simplified state space layers for sequence modeling (2022), arXiv:2208.04933.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxrec.config import at_least, one_of
from jaxrec.layers.linear import normal_cut_at_two
from jaxrec.layers.scan import scan_over_time
from jaxrec.layers.ssm import check_steps, log_uniform_steps, rescaled_step, start
from jaxrec.ops import hippo
from jaxrec.ops.discretize import discretize_diagonal, largest_decay

OutputInit = Literal["trunc_standard_normal", "lecun_normal", "complex_normal"]
Discretization = Literal["zoh", "bilinear"]
LARGEST_REAL_PART = -1e-4  # of a clipped eigenvalue


@dataclasses.dataclass(frozen=True, kw_only=True)
class S5Config:
    """Sizes, symmetries and where the parameters begin."""

    width: int  # features d, of input and output
    state: int  # n, states kept: with conj_sym each stands for a conjugate pair
    blocks: int = 1  # LegS matrices on the diagonal at the beginning (J of the paper)
    conj_sym: bool = True  # keep one eigenvalue of each conjugate pair
    bidirectional: bool = False  # also run from the end; such a layer cannot stream
    clip_eigs: bool = False  # real parts of eigenvalues are at most -1e-4
    step_rescale: float = 1.0  # factor on every dt
    output_init: OutputInit = "lecun_normal"
    discretization: Discretization = "zoh"
    dt_min: float = 1e-3  # steps begin log-uniform
    dt_max: float = 1e-1

    def __post_init__(self) -> None:
        at_least(self, 1, "width", "state", "blocks")
        if self.state % self.blocks:
            each = "conjugate pairs" if self.conj_sym else "eigenvalues"
            raise ValueError(
                f"S5Config: every block holds equally many {each}, so state must be a multiple of"
                f" blocks, got {self.state} and {self.blocks}."
            )
        one_of(self, "output_init", get_args(OutputInit))
        one_of(self, "discretization", get_args(Discretization))
        if not 0 < self.step_rescale < float("inf"):
            raise ValueError(f"S5Config: step_rescale must be > 0, got {self.step_rescale}.")
        check_steps("S5Config", self.dt_min, self.dt_max)

    @property
    def full_state(self) -> int:
        """Number of eigenvalues, counting both of a conjugate pair (P of the paper)."""
        return self.state * (2 if self.conj_sym else 1)

    def build(self, *, rngs: nnx.Rngs) -> "S5":
        """A freshly initialised layer."""
        return S5(self, rngs=rngs)


class S5(nnx.Module):
    """The layer without its nonlinearity. Complex parameters are kept as two real ones."""

    def __init__(self, config: S5Config, *, rngs: nnx.Rngs):
        self.config = config
        d, n, full = config.width, config.state, config.full_state
        block = hippo.legs_normal_plus_rank_one(full // config.blocks)
        kept = n // config.blocks
        eigenvalues = np.tile(block.eigenvalues[:kept], config.blocks)
        # Columns: the eigenvectors of the kept eigenvalues of each block, (full n).
        vectors = np.kron(np.eye(config.blocks), block.vectors[:, :kept])
        self.eigenvalue_real, self.eigenvalue_imag = (
            nnx.Param(jnp.asarray(x, jnp.float32), axes=("state",))
            for x in (eigenvalues.real, eigenvalues.imag)
        )
        inputs = normal_cut_at_two(full**-0.5)(rngs.params(), (full, d)).astype(jnp.complex64)
        self.input_real, self.input_imag = _two_params(
            jnp.asarray(vectors.conj().T, jnp.complex64) @ inputs, ("state", "embed")
        )
        axes = ("embed", "state")
        self.output_real, self.output_imag = _two_params(
            _initial_output(config, vectors, rngs.params()), axes
        )
        if config.bidirectional:
            self.reverse_output_real, self.reverse_output_imag = _two_params(
                _initial_output(config, vectors, rngs.params()), axes
            )
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (d,)), axes=("embed",))
        self.log_step = nnx.Param(
            log_uniform_steps(rngs.params(), (n,), config.dt_min, config.dt_max), axes=("state",)
        )

    def init_state(self, batch: int) -> Array:
        """Zero state (b n), complex64.

        Raises:
          ValueError: the layer is bidirectional.
        """
        if self.config.bidirectional:
            raise ValueError(
                "S5: a bidirectional layer needs the whole sequence at once and has no state to"
                " stream from."
            )
        return jnp.zeros((batch, self.config.state), jnp.complex64)

    def discretized(self, step_rescale: float | Array = 1.0) -> tuple[Array, Array]:
        """A_bar (n) and B_bar (n d), complex64."""
        decay, gain = self._system(step_rescale)
        return decay, gain[:, None] * lax.complex(*self._input())

    def largest_decay(self) -> Array:
        """The largest |A_bar|."""
        return largest_decay(self._system(1.0)[0])

    def _system(self, step_rescale: float | Array) -> tuple[Array, Array]:
        """A_bar and the factor of B, complex64: (n), or (b t n) with a factor (b t 1)."""
        real, imag = (
            parameter[...].astype(jnp.float32)
            for parameter in (self.eigenvalue_real, self.eigenvalue_imag)
        )
        if self.config.clip_eigs:
            real = jnp.minimum(real, LARGEST_REAL_PART)
        step, eigenvalues = self.log_step[...], lax.complex(real, imag)
        if jnp.ndim(step_rescale):
            step, eigenvalues = step[None, None], eigenvalues[None, None]
        step = rescaled_step("S5", step, step_rescale) * self.config.step_rescale
        return discretize_diagonal(eigenvalues, step, self.config.discretization)

    def _input(self) -> tuple[Array, Array]:
        """Real and imaginary part of B (n d), float32."""
        return self.input_real[...].astype(jnp.float32), self.input_imag[...].astype(jnp.float32)

    def __call__(
        self,
        x: Array,
        state: Array | None = None,
        *,
        reset: Array | None = None,
        valid: Array | None = None,
        step_rescale: float | Array = 1.0,
    ) -> tuple[Array, Array | None]:
        """Runs over x.

        Args:
          x: input (b t d).
          state: (b n) complex64 from `init_state` or the call before; None begins at zero.
          reset: bool (b t), True where a document begins; none sees another, in either direction.
          valid: bool (b t), False = padding, whose content, even if it is not finite, reaches no
            output elsewhere; the state after it is zero.
          step_rescale: factor on every dt, for a signal sampled at another rate than in training;
            or (b t), one for each step, for samples at unequal intervals: that from the step before
            over the usual one. The scan from the end takes them as they are, too. It multiplies
            that of the configuration.

        Returns:
          y (b t d) in x's dtype, and the last state; None for a bidirectional layer.

        Raises:
          ValueError: the state belongs to another batch, a bidirectional layer was given one, or
            step_rescale is not positive or of another shape.
        """
        if jnp.ndim(step_rescale) and jnp.shape(step_rescale) != x.shape[:2]:
            raise ValueError(
                f"S5: step_rescale must be one number or (b t) = {x.shape[:2]}, got shape"
                f" {jnp.shape(step_rescale)}."
            )
        if state is not None and self.config.bidirectional:
            raise ValueError(
                "S5: a bidirectional layer cannot stream; call it on the whole sequence without a"
                " state."
            )
        with jax.named_scope("s5"):
            wide = x.astype(jnp.float32)
            if valid is not None:
                wide = jnp.where(valid[..., None], wide, 0)
                reset = ~valid if reset is None else reset | ~valid
            if jnp.ndim(step_rescale):
                each = jnp.asarray(step_rescale, jnp.float32)
                each = each if valid is None else jnp.where(valid, each, 1.0)
                decay, gain = self._system(each[..., None])
                driven = gain * _product(wide, *self._input())
            else:
                decay, inputs = self.discretized(step_rescale)
                decay = decay[None, None]
                driven = _product(wide, jnp.real(inputs), jnp.imag(inputs))
            zeros = jnp.zeros((x.shape[0], self.config.state), jnp.complex64)
            states, last = scan_over_time(decay, driven, start("S5", state, x, zeros), reset=reset)
            y = _real_part_of_product(states, self.output_real, self.output_imag)
            if self.config.bidirectional:
                # Seen from the end, the step before a document's first belongs to another one.
                ends = None if reset is None else jnp.pad(reset[:, 1:], [(0, 0), (0, 1)])
                if ends is not None and valid is not None:
                    ends = ends | ~valid
                states, _ = scan_over_time(decay, driven, reverse=True, reset=ends)
                y = y + _real_part_of_product(
                    states, self.reverse_output_real, self.reverse_output_imag
                )
            y = (2 if self.config.conj_sym else 1) * y
            y = y + self.skip[...].astype(jnp.float32)[None, None] * wide
            return y.astype(x.dtype), None if self.config.bidirectional else last


def _product(x: Array, real: Array, imag: Array) -> Array:
    """B x_t for every step, complex64 (b t n)."""
    return lax.complex(jnp.einsum("btd,nd->btn", x, real), jnp.einsum("btd,nd->btn", x, imag))


def _real_part_of_product(states: Array, real: nnx.Param, imag: nnx.Param) -> Array:
    """Re(C x_t) for every step, without the half of the products that it does not need."""
    y = jnp.einsum("btn,dn->btd", jnp.real(states), real[...].astype(jnp.float32))
    return y - jnp.einsum("btn,dn->btd", jnp.imag(states), imag[...].astype(jnp.float32))


def _initial_output(config: S5Config, vectors: np.ndarray, key: Array) -> Array:
    """C, complex64 (d n): drawn for the full state and seen from the eigenvectors, or drawn."""
    d, n, full = config.width, config.state, config.full_state
    if config.output_init == "complex_normal":
        real, imag = jax.random.normal(key, (2, d, n)) * 0.5**0.5
        return lax.complex(real, imag)
    deviation = (full if config.output_init == "trunc_standard_normal" else full * d) ** -0.5
    real, imag = normal_cut_at_two(deviation)(key, (2, d, full))
    return lax.complex(real, imag) @ jnp.asarray(vectors, jnp.complex64)


def _two_params(x: Array, axes: tuple[str, ...]) -> tuple[nnx.Param, nnx.Param]:
    return nnx.Param(jnp.real(x), axes=axes), nnx.Param(jnp.imag(x), axes=axes)
