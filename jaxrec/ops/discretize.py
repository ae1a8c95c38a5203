"""From x' = A x + B u in continuous time to x_t = A_bar x_{t-1} + B_bar u_t with step dt.

    generalised bilinear   A_bar = (1 - alpha dt A)^-1 (1 + (1 - alpha) dt A)
                           B_bar = (1 - alpha dt A)^-1 dt B
    zero-order hold        A_bar = exp(dt A),   B_bar = A^-1 (A_bar - 1) B

with alpha = 0 Euler, 1/2 bilinear (Tustin), 1 backward Euler. A stable system stays stable for any
dt under zero-order hold and for alpha >= 1/2; under Euler it does not once |1 + dt lambda| > 1.
Nothing is raised then, because trained values are not known when a program is built; models report
`largest_decay` and, by `is_stable`, `unstable` at every evaluation.

Gu et al., Combining recurrent, convolutional, and continuous-time models with linear state-space
layers (2021), arXiv:2110.13985, section 2; Smith et al., S5 (2022), arXiv:2208.04933, section 2.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Method = Literal["zoh", "bilinear", "euler", "backward_euler"]
ALPHA = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0}

ROUNDING = 1e-5
"""By so much may |a| exceed one and count as one."""
SQUARINGS = 24

# (exp(z) - 1) / z = sum_k z^k / (k + 1)!; inside this radius ten terms leave less than 1e-10.
SERIES_RADIUS = 0.5
SERIES = [1 / float(np.prod(np.arange(1.0, k + 2))) for k in range(10)]


def generalised_bilinear(a: Array, b: Array, step: Array, alpha: float) -> tuple[Array, Array]:
    """Discretises a system with a dense matrix.

    Args:
      a: A (n n), per unit of time.
      b: B (n), per unit of time.
      step: dt > 0 in units of time, (...): one system for each.
      alpha: in [0, 1]: 0 Euler, 1/2 bilinear, 1 backward Euler.

    Returns:
      A_bar (... n n) and B_bar (... n), in the dtype of a.

    Raises:
      ValueError: alpha is not in [0, 1], shapes do not fit, or a step is known and not positive.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"generalised_bilinear: alpha must lie in [0, 1], got {alpha}.")
    if a.ndim != 2 or a.shape != b.shape * 2:
        raise ValueError(
            f"generalised_bilinear: a must be (n n) and b (n), got {a.shape} and {b.shape}."
        )
    _check_step("generalised_bilinear", step)
    identity = jnp.eye(a.shape[0], dtype=a.dtype)[(None,) * step.ndim]
    spread = step.astype(a.dtype)[..., None, None]
    scaled = spread * a[(None,) * step.ndim]
    right = jnp.concatenate(
        [
            identity + (1 - alpha) * scaled,
            spread * jnp.broadcast_to(b[:, None], (*step.shape, b.shape[0], 1)),
        ],
        axis=-1,
    )
    solved = jnp.linalg.solve(identity - alpha * scaled, right)
    return solved[..., :-1], solved[..., -1]


def discretize_diagonal(
    eigenvalues: Array, step: Array, method: Method = "zoh"
) -> tuple[Array, Array]:
    """Discretises systems with a diagonal matrix: A_bar = diag(decay), B_bar = gain * B.

    Nothing is divided by an eigenvalue, so that zero, an integrator, is as good as any.

    Args:
      eigenvalues: lambda, float or complex, per unit of time.
      step: dt > 0 in units of time, float; broadcasts with the eigenvalues, with as many axes.
      method: "zoh", "bilinear", "euler" or "backward_euler".

    Returns:
      decay, dimensionless, and gain, in units of time; both (...) in the dtype of the eigenvalues.

    Raises:
      ValueError: the method is unknown, or a step is known and not positive.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"discretize_diagonal: method must be one of {get_args(Method)}, got {method!r}."
        )
    _check_step("discretize_diagonal", step)
    z = eigenvalues * step.astype(eigenvalues.dtype)
    wide_step = jnp.broadcast_to(step, z.shape).astype(z.dtype)
    if method == "zoh":
        return jnp.exp(z), wide_step * _mean_growth(z)
    alpha = ALPHA[method]
    return (1 + (1 - alpha) * z) / (1 - alpha * z), wide_step / (1 - alpha * z)


def largest_decay(transition: Array, *, dense: bool = False) -> Array:
    """The largest |eigenvalue| of A_bar: x_t = A_bar x_{t-1} stays bounded from everywhere if it is
    at most one.

    Args:
      transition: the decays (... n) of a diagonal system, or its matrix (... n n).
      dense: it is a matrix, whose 2^SQUARINGS-th power is taken, by that root of its norm. On any
        backend, and for a matrix however far from normal the root leaves nothing of its condition.

    Returns:
      float (...).
    """
    if not dense:
        return jnp.max(jnp.abs(transition), axis=-1)

    def norm_of(x: Array) -> Array:
        return jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1)), jnp.finfo(x.dtype).tiny)

    def square(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        power, log_root = carry  # A^(2^i) without its norm, whose 2^i-th root this is
        power = jnp.matmul(power, power, precision="highest")
        norm = norm_of(power)
        return power / norm[..., None, None], log_root + jnp.log(norm) * 0.5 ** (i + 1)

    norm = norm_of(transition)
    start = transition / norm[..., None, None], jnp.log(norm)
    return jnp.exp(lax.fori_loop(0, SQUARINGS, square, start)[1])


def is_stable(transition: Array, *, dense: bool = False) -> Array:
    """Whether x_t = A_bar x_{t-1} stays bounded from everywhere, bool (...): no |eigenvalue|
    exceeds one. One on the circle, up to ROUNDING, counts as stable. Arguments as of
    `largest_decay`.
    """
    return largest_decay(transition, dense=dense) <= 1 + ROUNDING


def _mean_growth(z: Array) -> Array:
    """(exp(z) - 1) / z, whose value at zero is one; its gradient is right there too."""
    small = jnp.abs(z) < SERIES_RADIUS
    near = jnp.where(small, z, jnp.zeros_like(z))
    series = jnp.full_like(z, SERIES[-1])
    for coefficient in SERIES[-2::-1]:
        series = series * near + coefficient
    far = jnp.where(small, jnp.ones_like(z), z)
    return jnp.where(small, series, (jnp.exp(far) - 1) / far)


def _check_step(name: str, step: Array) -> None:
    if not isinstance(step, jax.core.Tracer) and not np.all(np.asarray(step) > 0):
        raise ValueError(f"{name}: every step must be > 0, got {np.min(np.asarray(step))}.")
