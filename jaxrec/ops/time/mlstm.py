"""The recurrence of the mLSTM: a matrix of memory whose input gate is an exponential.

    C_t = f_t C_{t-1} + e^{i_t} k_t v_t^T,    n_t = f_t n_{t-1} + e^{i_t} k_t,
    y_t = C_t^T q_t / max(|n_t . q_t|, 1)

with one forget gate 0 < f_t <= 1 and one input gate a head. It is `matrix_scan` of C with n for a
further column, both carried times e^{-m_t} with m from `running_max` for every batch element, head
and step, so that no exponent is positive. Nothing has m = 0, at the start and at resets.

Beck et al., xLSTM: extended long short-term memory (2024), arXiv:2405.04517, section 2.3; Beck et
al., xLSTM 7B: a recurrent LLM for fast and efficient inference (2025), arXiv:2503.13427 (epsilon).
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time.matrix_scan import Method, matrix_scan
from jaxrec.ops.time.running_max import running_max
from jaxrec.ops.time.scan import delayed, linear_scan
from jaxrec.ops.time.sharded import (
    sharded_linear_scan,
    sharded_matrix_scan,
    sharded_running_max,
)


class MLSTMState(NamedTuple):
    """The memory, e^m times what is kept: but for epsilon, (C e^c, n e^c, m - c) is the same state
    for any c.
    """

    memory: Array  # (b h k v) float32: C e^-m
    normaliser: Array  # (b h k) float32: n e^-m
    maximum: Array  # (b h) float32: m, the logarithm of the largest weight

    @classmethod
    def empty(cls, batch: int, heads: int, keys: int, values: int) -> "MLSTMState":
        """The state before the first step."""
        shapes = (batch, heads, keys, values), (batch, heads, keys), (batch, heads)
        return cls(*(jnp.zeros(shape) for shape in shapes))


def mlstm_scan(
    q: Array,
    k: Array,
    v: Array,
    input_gate: Array,
    log_forget: Array,
    state: MLSTMState | None = None,
    *,
    reset: Array | None = None,
    chunk: int = 64,
    eps: float = 1e-6,
    method: Method = "auto",
    axis: str | None = None,
) -> tuple[Array, MLSTMState]:
    """Runs the recurrence above over the time axis, with q scaled by k^-1/2.

    Args:
      q: queries (b t h k), t >= 1.
      k: keys (b t h k).
      v: values (b t h v).
      input_gate: i, the logarithm of the weight of each input, (b t h); of any size.
      log_forget: the logarithm of f, (b t h), <= 0.
      state: what was kept before the first step; nothing if None.
      reset: bool (b t). True: nothing enters this step.
      chunk: see `matrix_scan`.
      eps: added to the denominator as it is kept, y = C^T q / (max(|n . q|, e^-m) + eps).
      method: see `matrix_scan`; over devices it is always by chunks.
      axis: the axis of the current mesh over which time is spread, if it is.

    Returns:
      y (b t h v) in v's dtype, and the last state, float32 (float64 for such inputs).

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, chunk is below 1, or the method is unknown;
        or as `sharded_linear_scan`.
    """
    _check(q, k, v, input_gate, log_forget, state)
    arrays = (q, k, v, input_gate, log_forget, *(state or ()))
    wide = jnp.float64 if any(z.dtype == jnp.float64 for z in arrays) else jnp.float32
    if state is None:
        state = MLSTMState.empty(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    memory, normaliser, first = (leaf.astype(wide) for leaf in state)
    input_gate, log_forget = input_gate.astype(wide), log_forget.astype(wide)

    maximum: Any
    scan: Any
    if axis is None:
        maximum, scan = running_max, functools.partial(matrix_scan, method=method)
    else:
        maximum = functools.partial(sharded_running_max, axis=axis)
        scan = functools.partial(sharded_matrix_scan, axis=axis)

    entering = input_gate
    if reset is not None:  # there the maximum of nothing, 0, has its share instead of what was kept
        entering = jnp.where(reset[..., None], jnp.maximum(log_forget, input_gate), input_gate)
    m, last_maximum = maximum(log_forget, entering, first, reset=reset)
    m_before = delayed(m, first)
    if reset is not None:
        m_before = jnp.where(reset[..., None], 0, m_before)
    log_decay = log_forget + m_before - m
    # Not more than 0 but for rounding, and where it is 0 a minimum would halve its gradient.
    log_decay = log_decay - lax.stop_gradient(jnp.maximum(log_decay, 0))
    ones = jnp.ones_like(v[..., :1], dtype=wide)
    y, last = scan(
        q.astype(wide) * q.shape[-1] ** -0.5,
        k.astype(wide) * jnp.exp(input_gate - m)[..., None],
        jnp.concatenate([v.astype(wide), ones], axis=-1),
        log_decay,
        jnp.concatenate([memory, normaliser[..., None]], axis=-1),
        reset=reset,
        chunk=chunk,
    )
    unit = _one_with_gradient_of(m, m_before, log_forget, input_gate, first, reset, axis)
    denominator = jnp.maximum(jnp.abs(y[..., -1]), jnp.exp(-m)) + eps * unit
    y = y[..., :-1] / denominator[..., None]
    return y.astype(v.dtype), MLSTMState(last[..., :-1], last[..., -1], last_maximum)


def _one_with_gradient_of(
    m: Array,
    m_before: Array,
    log_forget: Array,
    input_gate: Array,
    first: Array,
    reset: Array | None,
    axis: str | None,
) -> Array:
    """1 with the gradient of e^m (b t h): epsilon is in a unit that depends on m.

    Which of the two is the maximum is known, so that m is a linear scan, and its gradient that of
    one.
    """
    keeps = log_forget + m_before >= input_gate
    reaches_back = keeps if reset is None else keeps & ~reset[..., None]
    scan = linear_scan if axis is None else functools.partial(sharded_linear_scan, axis=axis)
    log_unit, _ = scan(
        lax.stop_gradient(reaches_back.astype(m.dtype)),
        jnp.where(keeps, log_forget, input_gate),
        first,
    )
    return jnp.exp(log_unit - lax.stop_gradient(log_unit))


def _check(
    q: Array,
    k: Array,
    v: Array,
    input_gate: Array,
    log_forget: Array,
    state: MLSTMState | None,
) -> None:
    """Refuses what does not fit; the rest is for `running_max` to refuse."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"mlstm_scan: q must be (b t h k) and v (b t h v), got {q.shape} and {v.shape}."
        )
    batch, time, heads, keys = q.shape
    if time == 0:
        raise ValueError(f"mlstm_scan: needs at least one step, got t = 0 in q of shape {q.shape}.")
    values = v.shape[3]
    wanted = {
        "q": (q, "(b t h k)", q.shape),
        "k": (k, "(b t h k)", q.shape),
        "v": (v, "(b t h v)", (batch, time, heads, values)),
        "input_gate": (input_gate, "(b t h)", q.shape[:3]),
        "log_forget": (log_forget, "(b t h)", q.shape[:3]),
    }
    if state is not None:
        wanted |= {
            "state.memory": (state.memory, "(b h k v)", (batch, heads, keys, values)),
            "state.normaliser": (state.normaliser, "(b h k)", (batch, heads, keys)),
            "state.maximum": (state.maximum, "(b h)", (batch, heads)),
        }
    for name, (z, letters, shape) in wanted.items():
        if z.shape != shape:
            raise ValueError(f"mlstm_scan: {name} must be {letters} = {shape}, got {z.shape}.")
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"mlstm_scan: {name} must be real floats, got {z.dtype}.")
