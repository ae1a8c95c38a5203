"""The WKV operator of RWKV-4: a weighted mean of the past whose weights decay, and of the present
with a weight of its own.

    y_t = (a_{t-1} + e^{u + k_t} v_t) / (b_{t-1} + e^{u + k_t})
    a_t = e^{-w} a_{t-1} + e^{k_t} v_t,    b_t = e^{-w} b_{t-1} + e^{k_t}

It is a `linear_scan` of a and b side by side, both carried times e^{-m_t} with m from
`running_max`, so that no exponent is positive. The state is read before it is updated.

Peng et al., RWKV: reinventing RNNs for the transformer era (2023), arXiv:2305.13048, section 3.1.2.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time.running_max import running_max
from jaxrec.ops.time.scan import delayed, linear_scan
from jaxrec.ops.time.sharded import sharded_linear_scan, sharded_running_max


class WKVState(NamedTuple):
    """The two sums, e^m times what is kept, so that any (a e^c, b e^c, m - c) is the same state."""

    numerator: Array  # (b e) float32: a e^-m
    denominator: Array  # (b e) float32: b e^-m
    maximum: Array  # (b e) float32: m, the logarithm of the largest weight; -inf: nothing yet

    @classmethod
    def empty(cls, batch: int, width: int) -> "WKVState":
        """The state before the first step."""
        zeros = jnp.zeros((batch, width))
        return cls(zeros, zeros, jnp.full_like(zeros, -jnp.inf))


def wkv(
    k: Array,
    v: Array,
    rate: Array,
    bonus: Array,
    state: WKVState | None = None,
    *,
    reset: Array | None = None,
    axis: str | None = None,
) -> tuple[Array, WKVState]:
    """Runs the recurrence above over the time axis.

    Args:
      k: logarithm of the weight of each input, (b t e), t >= 1.
      v: input (b t e).
      rate: w, how much the logarithm of a weight falls in a step, (e); >= 0.
      bonus: u, added to the logarithm of the weight of the present input, (e).
      state: what was kept before the first step; nothing if None.
      reset: bool (b t). True: nothing enters this step.
      axis: the axis of the current mesh over which time is spread, if it is.

    Returns:
      y (b t e) in v's dtype, and the last state, float32 (float64 for such inputs).

    Raises:
      ValueError: shapes or dtypes do not fit, or t is 0.
    """
    dtype = _check(k, v, rate, bonus, state, reset)
    if state is None:
        state = WKVState.empty(k.shape[0], k.shape[2])
    numerator, denominator, first = (leaf.astype(dtype) for leaf in state)
    k, v_wide, rate, bonus = (z.astype(dtype) for z in (k, v, rate[None, None], bonus[None, None]))
    scan = linear_scan if axis is None else functools.partial(sharded_linear_scan, axis=axis)
    maximum = running_max if axis is None else functools.partial(sharded_running_max, axis=axis)

    m, last_maximum = maximum(-rate, k, first, reset=reset)
    m_before = delayed(m, first)
    if reset is not None:
        m_before = jnp.where(reset[..., None], -jnp.inf, m_before)
    gain = jnp.exp(k - m)
    start = jnp.stack([numerator, denominator], axis=1)
    sums, last = scan(
        jnp.exp(m_before - rate - m)[:, :, None], jnp.stack([gain * v_wide, gain], axis=2), start
    )
    before = delayed(sums, start)
    # The scale of a fraction: it cancels, and so does its gradient.
    largest = lax.stop_gradient(jnp.maximum(m_before, bonus + k))
    past, present = jnp.exp(m_before - largest), jnp.exp(bonus + k - largest)
    y = (past * before[:, :, 0] + present * v_wide) / (past * before[:, :, 1] + present)
    return y.astype(v.dtype), WKVState(last[:, 0], last[:, 1], last_maximum)


def _check(
    k: Array, v: Array, rate: Array, bonus: Array, state: WKVState | None, reset: Array | None
) -> jnp.dtype:
    """Refuses what does not fit; returns the dtype in which the recurrence runs."""
    if k.ndim != 3:
        raise ValueError(f"wkv: k must be (b t e), got shape {k.shape}.")
    batch, time, width = k.shape
    if time == 0:
        raise ValueError(f"wkv: needs at least one step, got t = 0 in k of shape {k.shape}.")
    wanted = {
        "k": (k, "(b t e)", k.shape),
        "v": (v, "(b t e)", k.shape),
        "rate": (rate, "(e)", (width,)),
        "bonus": (bonus, "(e)", (width,)),
    }
    if state is not None:
        wanted |= {
            f"state.{name}": (leaf, "(b e)", (batch, width))
            for name, leaf in state._asdict().items()
        }
    for name, (z, letters, shape) in wanted.items():
        if z.shape != shape:
            raise ValueError(f"wkv: {name} must be {letters} = {shape}, got {z.shape}.")
        if not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"wkv: {name} must be real floats, got {z.dtype}.")
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"wkv: reset must be bool (b t) = {(batch, time)}, got {reset.dtype} {reset.shape}."
        )
    is_double = any(z.dtype == jnp.float64 for z, _, _ in wanted.values())
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)
