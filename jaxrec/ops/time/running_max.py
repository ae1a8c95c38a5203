"""The running maximum that decays, m_t = max(log_decay_t + m_{t-1}, x_t): the max-plus scan.

Where inputs enter a linear recurrence with weights exp(x_t), what it has kept by step t is at most
a sum of terms exp(m_t). Carrying h_t exp(-m_t) instead of h_t,

    h_t exp(-m_t) = exp(log_decay_t + m_{t-1} - m_t) h_{t-1} exp(-m_{t-1}) + exp(x_t - m_t) ...,

takes exponents that are never positive, so that no gate is too large for float32.

Milakov & Gimelshein, Online normalizer calculation for softmax (2018), arXiv:1805.02867; with a
decay: Beck et al., xLSTM: extended long short-term memory (2024), arXiv:2405.04517, section 2.2.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.time.loop import over_time

Method = Literal["auto", "sequential", "associative"]


def running_max(
    log_decay: Array,
    x: Array,
    m0: Array | None = None,
    *,
    reset: Array | None = None,
    method: Method = "auto",
) -> tuple[Array, Array]:
    """Runs m_t = max(log_decay_t + m_{t-1}, x_t) over the time axis.

    No gradient passes: what is scaled by exp(-m_t) and divided by something scaled alike does not
    depend on m, whatever m is, so that the gradient taken with m constant is the whole gradient.

    Args:
      log_decay: logarithm of the decay, (b t ...), float, or any shape that broadcasts to x's.
      x: logarithm of the weights of the inputs, float, (b t ...) with any trailing axes, t >= 1.
      m0: the maximum before the first step, (b ...); -inf, the maximum of nothing, if None.
      reset: bool, (b t). True: the maximum that enters this step is -inf.
      method: "sequential" is one pass over time with the least memory; "associative" has O(log t)
        depth and a trace that grows with log t; "auto" is sequential on CPU and associative on
        accelerators. A single step is taken as it is.

    Returns:
      m, shaped as x, and the last of them, (b ...), ready to be the next call's m0; both float32
      (float64 for such inputs).

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, or the method is unknown.
    """
    return run(*prepare(log_decay, x, m0, reset, method), method)


def prepare(
    log_decay: Array, x: Array, m0: Array | None, reset: Array | None, method: Method
) -> tuple[Array, Array, Array]:
    """The arguments of `run` from those of `running_max`, checked: log_decay as large as x and -inf
    at resets.
    """
    if method not in get_args(Method):
        raise ValueError(f"running_max: method must be one of {get_args(Method)}, got {method!r}.")
    log_decay = _check(log_decay, x, m0, reset)
    given = [z for z in (log_decay, x, m0) if z is not None]
    dtype = jnp.float64 if any(z.dtype == jnp.float64 for z in given) else jnp.float32
    log_decay, x = log_decay.astype(dtype), x.astype(dtype)
    if reset is not None:
        at_reset = reset.reshape(reset.shape + (1,) * (x.ndim - 2))
        log_decay = jnp.where(at_reset, -jnp.inf, log_decay)
    m0 = jnp.full_like(x[:, 0], -jnp.inf) if m0 is None else m0.astype(dtype)
    return lax.stop_gradient(log_decay), lax.stop_gradient(x), lax.stop_gradient(m0)


def _check(log_decay: Array, x: Array, m0: Array | None, reset: Array | None) -> Array:
    """Refuses what does not fit; returns log_decay as large as x."""
    for name, z in (("log_decay", log_decay), ("x", x), ("m0", m0)):
        if z is not None and not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"running_max: {name} must be real floats, got {z.dtype}.")
    if x.ndim < 2:
        raise ValueError(f"running_max: x must be (b t ...), got shape {x.shape}.")
    if x.shape[1] == 0:
        raise ValueError(
            f"running_max: needs at least one step, got t = 0 in x of shape {x.shape}."
        )
    state_shape = x.shape[:1] + x.shape[2:]
    if m0 is not None and m0.shape != state_shape:
        raise ValueError(f"running_max: m0 must be (b ...) = {state_shape}, got {m0.shape}.")
    if reset is not None and (reset.shape != x.shape[:2] or reset.dtype != jnp.bool_):
        raise ValueError(
            f"running_max: reset must be bool (b t) = {x.shape[:2]},"
            f" got {reset.dtype} {reset.shape}."
        )
    try:
        return jnp.broadcast_to(log_decay, x.shape)
    except ValueError:
        raise ValueError(
            f"running_max: log_decay must broadcast to x (b t ...), got {log_decay.shape} and"
            f" {x.shape}. For a decay shared over trailing axes, add axes of size 1 first."
        ) from None


def run(log_decay: Array, x: Array, m0: Array, method: Method) -> tuple[Array, Array]:
    """The recurrence alone; log_decay and x (b t ...) alike, m0 (b ...)."""
    if x.shape[1] == 1:
        m = jnp.maximum(log_decay[:, 0] + m0, x[:, 0])
        return m[:, None], m
    if method == "auto":
        return lax.platform_dependent(log_decay, x, m0, cpu=_sequential, default=_associative)
    return (_sequential if method == "sequential" else _associative)(log_decay, x, m0)


def _sequential(log_decay: Array, x: Array, m0: Array) -> tuple[Array, Array]:
    def step(m: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        m = jnp.maximum(inputs[0] + m, inputs[1])
        return m, m

    last, m = over_time(step, m0, (log_decay, x))
    return m, last


def _associative(log_decay: Array, x: Array, m0: Array) -> tuple[Array, Array]:
    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] + right[0], jnp.maximum(right[0] + left[1], right[1])

    total, alone = lax.associative_scan(combine, (log_decay, x), axis=1)
    m = jnp.maximum(total + m0[:, None], alone)
    return m, m[:, -1]
