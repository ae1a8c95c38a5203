"""The sLSTM by Newton's method: its recurrence in numbers that are smooth and stay in range.

With q = c / n, the weighted mean of what has entered, and l = log n, the logarithm of the weights,

    l_t = log(e^{log f' + l_{t-1}} + e^i),   q_t = q_{t-1} + e^{i - l_t} (tanh(z) - q_{t-1}),
    h_t = sigmoid(o) q_t

which needs no running maximum. A head's 3 n numbers h, q and l mix, heads do not: the Jacobian is a
matrix (3n 3n) of each head, so that this pays, if at all, for small heads on accelerators.

Beck et al., xLSTM: extended long short-term memory (2024), arXiv:2405.04517, section 2.2.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.newton.plan import NewtonInfo
from jaxrec.ops.newton.scan import newton_scan
from jaxrec.ops.time import slstm
from jaxrec.ops.time.slstm import SLSTMState

NOTHING = -1e30
"""The logarithm of no weight at all, of a size that can be calculated with."""


def slstm_newton_scan(
    x: Array,
    recurrent: Array,
    state: SLSTMState | None = None,
    *,
    reset: Array | None = None,
    **options: Any,
) -> tuple[Array, SLSTMState, NewtonInfo]:
    """`slstm_scan` by `newton_scan`.

    Args:
      x: what the input gives to z, i, f and o, (b t 4 h n), t >= 1.
      recurrent: R (4 h n n).
      state: before the first step; nothing if None. Of a state in which nothing has entered, the
        cell c is taken as zero and has no gradient.
      reset: bool (b t). True: nothing enters this step, not even h.
      **options: of `newton_scan`: method, max_iters, tol, window, axis and so on.

    Returns:
      h (b t h n) in x's dtype, the last state, float32 (float64 for such inputs), which is scaled
      to n = 1, and how the iteration ended.

    Raises:
      ValueError: shapes or dtypes do not fit, or t is 0.
    """
    dtype = slstm.check(x, recurrent, state, reset)
    batch, _, _, heads, size = x.shape
    if state is None:
        state = SLSTMState.empty(batch, heads, size)
    start = _packed(jax.tree.map(lambda leaf: leaf.astype(dtype), state))
    packed, info = newton_scan(
        _step,
        recurrent.astype(dtype),
        (x.astype(dtype), reset),
        start,
        jacobian=_jacobian,
        check=False,
        **options,
    )
    h, q, log_weight = jnp.split(packed, 3, axis=2)  # (b t n h) each
    last = (jnp.swapaxes(part[:, -1], 1, 2) for part in (h, q, log_weight))
    return jnp.swapaxes(h, 2, 3).astype(x.dtype), _unpacked(*last), info


def _packed(state: SLSTMState) -> Array:
    """The state as (b 3n h)."""
    hidden, cell, normaliser, maximum = state
    holds = normaliser > 0
    weight = jnp.where(holds, normaliser, 1)
    q = jnp.where(holds, cell / weight, 0)
    log_weight = jnp.where(holds, jnp.where(holds, maximum, 0) + jnp.log(weight), NOTHING)
    return jnp.swapaxes(jnp.concatenate([hidden, q, log_weight], axis=2), 1, 2)


def _unpacked(hidden: Array, q: Array, log_weight: Array) -> SLSTMState:
    """The state with n = 1; its maximum has no gradient, as that of `slstm_step`."""
    maximum = lax.stop_gradient(log_weight)
    weight = jnp.exp(log_weight - maximum)
    return SLSTMState(hidden, q * weight, weight, maximum)


def _step(recurrent: Array, state: Array, inputs: tuple[Array, Array | None]) -> Array:
    x, reset = inputs
    hidden, q, log_weight = jnp.split(state, 3, axis=1)  # (b n h) each
    if reset is not None:
        begins = reset[:, None, None]
        hidden, q = (jnp.where(begins, 0, part) for part in (hidden, q))
        log_weight = jnp.where(begins, NOTHING, log_weight)
    mixed = jnp.einsum("bnh,ghnm->bgmh", hidden, recurrent, precision="highest")
    z, i, f, o = jnp.moveaxis(jnp.swapaxes(x, 2, 3) + mixed, 1, 0)
    log_weight = jnp.logaddexp(jax.nn.log_sigmoid(f) + log_weight, i)
    q = q + jnp.exp(i - log_weight) * (jnp.tanh(z) - q)
    return jnp.concatenate([jax.nn.sigmoid(o) * q, q, log_weight], axis=1)


def _jacobian(recurrent: Array, state: Array, inputs: tuple[Array, Array | None]) -> Array:
    """(b 3n 3n h): one derivative for each number of a head, for all heads at once."""
    _, linear = jax.linearize(lambda state: _step(recurrent, state, inputs), state)
    basis = jnp.eye(state.shape[1], dtype=state.dtype)[:, None, :, None]
    columns = jax.vmap(lambda e: linear(jnp.broadcast_to(e, state.shape)))(basis)
    return jnp.moveaxis(columns, 0, 2)
