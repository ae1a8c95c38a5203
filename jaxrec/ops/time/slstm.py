"""The recurrence of the sLSTM: an LSTM with an exponential input gate, normalised by its sum.

    z, i, f, o = x_t + R h_{t-1},   log f' = log sigmoid(f)
    c_t = f' c_{t-1} + e^i tanh(z),   n_t = f' n_{t-1} + e^i,   h_t = sigmoid(o) c_t / n_t

with R block-diagonal: channels mix within a head. c and n are carried times e^{-m_t} with m_t =
max(log f' + m_{t-1}, i), which cancels in h. The gates depend on h, so that the steps run one after
another.

Beck et al., xLSTM: extended long short-term memory (2024), arXiv:2405.04517, section 2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time.loop import over_time


class SLSTMState(NamedTuple):
    """What is carried; (c e^s, n e^s, m - s) is the same state for any s."""

    hidden: Array  # (b h n) float32: h
    cell: Array  # (b h n) float32: c e^-m
    normaliser: Array  # (b h n) float32: n e^-m
    maximum: Array  # (b h n) float32: m, the logarithm of the largest weight; -inf: nothing yet

    @classmethod
    def empty(cls, batch: int, heads: int, size: int) -> "SLSTMState":
        """The state before the first step."""
        zeros = jnp.zeros((batch, heads, size))
        return cls(zeros, zeros, zeros, jnp.full_like(zeros, -jnp.inf))


def slstm_step(recurrent: Array, state: SLSTMState, x: Array) -> SLSTMState:
    """One step, of arrays of one dtype.

    Args:
      recurrent: R (4 h n n), from h to z, i, f and o in this order.
      state: of the step before.
      x: what the input gives to z, i, f and o, (b 4 h n).

    Returns:
      The next state, whose `hidden` is what the step puts out.
    """
    gates = x + jnp.einsum("bhn,ghnm->bghm", state.hidden, recurrent)
    z, i, f, o = (gates[:, gate] for gate in range(4))
    kept = jax.nn.log_sigmoid(f) + state.maximum
    # The result does not depend on m, so that its gradient with m constant is the whole gradient.
    m = lax.stop_gradient(jnp.maximum(kept, i))
    forget, enter = jnp.exp(kept - m), jnp.exp(i - m)
    cell = forget * state.cell + enter * jnp.tanh(z)
    normaliser = forget * state.normaliser + enter  # at least 1: one of the two is e^0
    return SLSTMState(jax.nn.sigmoid(o) * cell / normaliser, cell, normaliser, m)


def slstm_scan(
    x: Array, recurrent: Array, state: SLSTMState | None = None, *, reset: Array | None = None
) -> tuple[Array, SLSTMState]:
    """Runs `slstm_step` over the time axis.

    Args:
      x: what the input gives to z, i, f and o, (b t 4 h n), t >= 1.
      recurrent: R (4 h n n).
      state: before the first step; nothing if None.
      reset: bool (b t). True: nothing enters this step, not even h.

    Returns:
      h (b t h n) in x's dtype, and the last state, float32 (float64 for such inputs).

    Raises:
      ValueError: shapes or dtypes do not fit, or t is 0.
    """
    dtype = check(x, recurrent, state, reset)
    batch, _, _, heads, size = x.shape
    nothing = SLSTMState.empty(batch, heads, size)
    state, nothing = (
        jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (state or nothing, nothing)
    )
    matrix = recurrent.astype(dtype)

    def step(state: SLSTMState, inputs: tuple[Array, Array | None]) -> tuple[SLSTMState, Array]:
        x, reset = inputs
        if reset is not None:
            begins = reset[:, None, None]
            state = jax.tree.map(lambda old, new: jnp.where(begins, new, old), state, nothing)
        state = slstm_step(matrix, state, x.astype(dtype))
        return state, state.hidden.astype(x.dtype)

    last, h = over_time(step, state, (x, reset))
    return h, last


def check(x: Array, recurrent: Array, state: SLSTMState | None, reset: Array | None) -> jnp.dtype:
    """Refuses what does not fit; returns the dtype in which the recurrence runs."""
    if x.ndim != 5 or x.shape[2] != 4:
        raise ValueError(f"slstm_scan: x must be (b t 4 h n), got shape {x.shape}.")
    batch, time, _, heads, size = x.shape
    if time == 0:
        raise ValueError(f"slstm_scan: needs at least one step, got t = 0 in x of shape {x.shape}.")
    wanted = {
        "x": (x, "(b t 4 h n)", x.shape),
        "recurrent": (recurrent, "(4 h n n)", (4, heads, size, size)),
    }
    if state is not None:
        wanted |= {
            f"state.{name}": (leaf, "(b h n)", (batch, heads, size))
            for name, leaf in state._asdict().items()
        }
    for name, (z, letters, shape) in wanted.items():
        if z.shape != shape:
            raise ValueError(f"slstm_scan: {name} must be {letters} = {shape}, got {z.shape}.")
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"slstm_scan: {name} must be real floats, got {z.dtype}.")
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"slstm_scan: reset must be bool (b t) = {(batch, time)},"
            f" got {reset.dtype} {reset.shape}."
        )
    is_double = any(z.dtype == jnp.float64 for z, _, _ in wanted.values())
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)
