"""Damping by a Kalman filter (ELK): steps that may trust the last iterate more than the model.

The increment d of an iterate is the mean that a filter finds for d_t = J_t d_{t-1} + r_t + noise of
variance 1 when it observes d_t = 0 with noise of variance s:

    P_t = J_t S_{t-1} J_t^T + I,   G_t = s (P_t + s I)^-1,   S_t = G_t P_t,   S_0 = 0
    d_t = G_t (J_t d_{t-1} + r_t)

which is a linear recurrence once the gains are known. They do not depend on r, and S is found at
O(log t) depth. A large s is Newton's method, a small one keeps to the iterate.

Gonzalez et al., Towards scalable and stable parallelization of nonlinear RNNs (2024),
arXiv:2407.19115, section 4; Särkkä & García-Fernández, Temporal parallelization of Bayesian
smoothers (2021), arXiv:1905.13002, section 4, for the parallel filter.
"""

import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time.scan import shifted

Elements = tuple[Array, Array, Array]


def damped(jacobian: Array, residual: Array, variance: float) -> tuple[Array, Array]:
    """G J and G r.

    Args:
      jacobian: (b t m n) or (b t m m n); the state that enters the first step is known.
      residual: (b t m n).
      variance: s, of the observation, in units of the noise of a step.
    """
    if jacobian.ndim == 4:
        return _elementwise(jacobian, residual, variance)
    f = jnp.moveaxis(jacobian, -1, 2)  # (b t n m m)
    identity = jnp.eye(f.shape[-1], dtype=f.dtype)
    covariance = _covariances(f, variance, identity)
    before = shifted(covariance, jnp.zeros_like(covariance[:, 0]), towards_start=False)
    predicted = _product(_product(f, before), _transposed(f)) + _like(identity, f)
    gain = variance * jnp.linalg.inv(predicted + variance * _like(identity, f))
    a = jnp.moveaxis(_product(gain, f), 2, -1)
    r = jnp.einsum("btnij,btjn->btin", gain, residual, precision="highest")
    return a, r


def _elementwise(f: Array, residual: Array, variance: float) -> tuple[Array, Array]:
    kept = 1 / (1 + variance)
    a, c, j = (1 - kept) * f, jnp.full_like(f, 1 - kept), kept * jnp.square(f)
    first = lax.broadcasted_iota(jnp.int32, f.shape, 1) == 0

    def combine(left: Elements, right: Elements) -> Elements:
        (a1, c1, j1), (a2, c2, j2) = left, right
        share = 1 / (1 + c1 * j2)
        return a1 * a2 * share, jnp.square(a2) * c1 * share + c2, j2 * jnp.square(a1) * share + j1

    elements = (jnp.where(first, 0, a), c, jnp.where(first, 0, j))
    _, covariance, _ = lax.associative_scan(combine, elements, axis=1)
    before = shifted(covariance, jnp.zeros_like(covariance[:, 0]), towards_start=False)
    gain = variance / (jnp.square(f) * before + 1 + variance)
    return gain * f, gain * residual


def _covariances(f: Array, variance: float, identity: Array) -> Array:
    """S_t (b t n m m) for transitions f."""
    kept = 1 / (1 + variance)
    a, c = (1 - kept) * f, (1 - kept) * jnp.broadcast_to(_like(identity, f), f.shape)
    j = kept * _product(_transposed(f), f)
    first = lax.broadcasted_iota(jnp.int32, f.shape, 1) == 0

    def combine(left: Elements, right: Elements) -> Elements:
        (a1, c1, j1), (a2, c2, j2) = left, right
        share = jnp.linalg.inv(_like(identity, c1) + _product(c1, j2))
        through = _product(a2, share)
        return (
            _product(through, a1),
            _product(_product(through, c1), _transposed(a2)) + c2,
            _product(_product(_transposed(a1), _product(j2, share)), a1) + j1,
        )

    elements = (jnp.where(first, 0, a), c, jnp.where(first, 0, j))
    return lax.associative_scan(combine, elements, axis=1)[1]


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _like(identity: Array, x: Array) -> Array:
    return identity.reshape((1,) * (x.ndim - 2) + identity.shape)
