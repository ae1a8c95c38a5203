"""The linear recurrence whose state is a matrix: keys write values into it, queries read it.

    gated   S_t = exp(g_t) S_{t-1} + k_t v_t^T                                    y_t = S_t^T q_t
    delta   S' = exp(g_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T     y_t = S_t^T q_t

The delta rule takes out what the state holds for k_t before it writes. With the right decays these
are linear attention, RetNet, GLA, Mamba-2's scan, DeltaNet, Gated DeltaNet and KDA.

The form by chunks, and its gradient, are in `ops.time.matrix_chunks`.

Yang et al., Gated linear attention transformers with hardware-efficient training (2023),
arXiv:2312.06635, section 4; Yang et al., Parallelizing linear transformers with the delta rule over
sequence length (2024), arXiv:2406.06484, section 3; Yang et al., Gated delta networks (2024),
arXiv:2412.06464; Kimi Linear (2025), arXiv:2510.26692 (KDA).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.ops.time.chunk import zero_decay
from jaxrec.ops.time.matrix_chunks import (
    Inputs,
    chunkwise,
    from_chunks,
    precision,
    to_chunks,
    whole_chunk,
    widened,
)

Rule = Literal["gated", "delta"]
Method = Literal["auto", "sequential", "chunkwise"]


def matrix_scan(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None = None,
    state: Array | None = None,
    *,
    beta: Array | None = None,
    rule: Rule = "gated",
    normalise: float | None = None,
    reset: Array | None = None,
    chunk: int = 64,
    method: Method = "auto",
) -> tuple[Array, Array]:
    """Runs S_t = exp(g_t) S_{t-1} + k_t v_t^T, or the delta rule, and reads y_t = S_t^T q_t.

    Args:
      q: queries (b t g k), t >= 1; not scaled here. Each is that of h / g heads in a row: g divides
        h, and is h where every head has its own.
      k: keys (b t g k); not normalised here. The delta rule multiplies the state by
        I - beta_t k_t k_t^T, which only contracts if beta_t |k_t|^2 <= 2: normalise its keys.
      v: values (b t h v).
      log_decay: g <= 0, (b t h) for every head or (b t h k) for every row of its state; None: 0.
      state: S before the first step, (b h k v) float32; zero if None.
      beta: how much of the old value the delta rule replaces, (b t h); None: all, 1.
      rule: "gated" or "delta".
      normalise: None, or epsilon of y_t / (z_t . q_t + epsilon), with z the equally decayed sum of
        the keys; gated rule only. z is the last column of the state, which is (b h k v+1) then.
      reset: bool (b t). True: the state that enters this step is zero. It is a decay of zero: a
        state that has overflowed to infinity is not stopped by it.
      chunk: steps that are worked on together, at the cost of c x c products for each head, rounded
        up to a power of two; the gradient keeps t / chunk states.
      method: "sequential" is one loop over time, the definition; "chunkwise" has depth t / chunk
        and consists of matrix products; "auto" is sequential for a single step.

    Returns:
      y (b t h v) in v's dtype, and the last state, float32 (float64 for such inputs), ready to be
      the next call's `state`. Decays, sums and the state itself are in the dtype of the state. Log
      decays below -128 (float64: -1024) count as that, whose exponential is zero.

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, chunk is below 1, the rule or the method is
        unknown, beta comes without the delta rule, normalise with it, or a log decay is positive.
        Under `jit`, where its value is not known, a positive one makes NaN from its step on.
    """
    inputs, state = prepare(
        "matrix_scan", q, k, v, log_decay, state, beta, rule, normalise, reset, chunk
    )
    if method not in get_args(Method):
        raise ValueError(f"matrix_scan: method must be one of {get_args(Method)}, got {method!r}.")
    if method == "sequential" or (method == "auto" and q.shape[1] == 1):
        y, last = _sequential(inputs, state, chunk)
    else:
        y, last = chunkwise(inputs, state, chunk)
    return finished(y, normalise, v.dtype), last


def prepare(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    state: Array | None,
    beta: Array | None,
    rule: Rule,
    normalise: float | None,
    reset: Array | None,
    chunk: int,
) -> tuple[Inputs, Array]:
    """The arguments of `matrix_scan`, checked, with resets in the decay and with what `normalise`
    adds to the values; decays, beta and the state in the dtype of the state.
    """
    wide = _check(name, q, k, v, log_decay, state, beta, rule, normalise, reset, chunk)
    batch, _, groups, keys = q.shape
    heads = v.shape[2]
    if groups < heads and (rule == "delta" or (log_decay is not None and log_decay.ndim == 4)):
        q, k = (jnp.repeat(x, heads // groups, axis=2) for x in (q, k))
    if normalise is not None:
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    if state is None:
        state = jnp.zeros((batch, heads, keys, v.shape[-1]), wide)
    if log_decay is not None:
        g = log_decay.astype(wide)
        g = jnp.where(g > 0, jnp.nan, jnp.maximum(g, zero_decay(wide)))
        log_decay = g[..., None] if g.ndim == 3 else g
    if reset is not None:
        if log_decay is None:
            log_decay = jnp.zeros_like(v[..., :1], wide)
        log_decay = jnp.where(reset[:, :, None, None], zero_decay(wide), log_decay)
    if rule == "delta":
        beta = jnp.ones_like(v[..., :1], wide) if beta is None else beta.astype(wide)[..., None]
    return Inputs(q, k, v, log_decay, beta), state.astype(wide)


def finished(y: Array, normalise: float | None, dtype: Any) -> Array:
    """What is returned of what the state was read as."""
    if normalise is not None:
        y = y[..., :-1] / (y[..., -1:] + normalise)
    return y.astype(dtype)


def _check(
    name: str,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    state: Array | None,
    beta: Array | None,
    rule: Rule,
    normalise: float | None,
    reset: Array | None,
    chunk: int,
) -> jnp.dtype:
    """Refuses what does not fit; returns the dtype in which the recurrence runs."""
    if rule not in get_args(Rule):
        raise ValueError(f"{name}: rule must be one of {get_args(Rule)}, got {rule!r}.")
    if chunk < 1:
        raise ValueError(f"{name}: chunk must be >= 1, got {chunk}.")
    if beta is not None and rule != "delta":
        raise ValueError(f"{name}: beta belongs to the delta rule, got rule={rule!r}.")
    if normalise is not None and rule != "gated":
        raise ValueError(f"{name}: normalise belongs to the gated rule, got rule={rule!r}.")
    given = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "state": state}
    floats = {letter: x for letter, x in given.items() if x is not None}
    for letter, x in floats.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: {letter} must be real floats, got {x.dtype}.")
    if q.ndim != 4:
        raise ValueError(f"{name}: q must be (b t g k), got shape {q.shape}.")
    batch, time, groups, keys = q.shape
    if time == 0:
        raise ValueError(f"{name}: needs at least one step, got t = 0 in q of shape {q.shape}.")
    if k.shape != q.shape:
        raise ValueError(f"{name}: k must be (b t g k) = {q.shape} as q, got {k.shape}.")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % groups:
        raise ValueError(
            f"{name}: v must be (b t h v) with (b t) = {q.shape[:2]} as in q and h a multiple of"
            f" its {groups} heads, got {v.shape}."
        )
    steps = v.shape[:3]
    if log_decay is not None and log_decay.shape not in (steps, (*steps, keys)):
        raise ValueError(
            f"{name}: log_decay must be (b t h) = {steps} or (b t h k) = {(*steps, keys)},"
            f" got {log_decay.shape}."
        )
    if beta is not None and beta.shape != steps:
        raise ValueError(f"{name}: beta must be (b t h) = {steps}, got {beta.shape}.")
    extra = "" if normalise is None else "+1"
    wanted = (batch, steps[2], keys, v.shape[-1] + (normalise is not None))
    if state is not None and state.shape != wanted:
        raise ValueError(f"{name}: state must be (b h k v{extra}) = {wanted}, got {state.shape}.")
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"{name}: reset must be bool (b t) = {(batch, time)}, got {reset.dtype} {reset.shape}."
        )
    known = log_decay is not None and not isinstance(log_decay, jax.core.Tracer)
    if known and np.any(np.asarray(log_decay) > 0):
        raise ValueError(
            f"{name}: log_decay must be <= 0, the logarithm of a decay of at most 1,"
            f" got {np.max(np.asarray(log_decay))}."
        )
    is_double = any(x.dtype == jnp.float64 for x in floats.values())
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def _outer(k: Array, v: Array) -> Array:
    """k v^T."""
    return k[..., None] * v[..., None, :]


def _outer_apart(k: Array, v: Array) -> Array:
    """The same as a product of two columns each, of which one is zero. A product of single columns
    XLA would merge with what made k and v, and make them again for every number of the state.
    """
    columns = jnp.stack([k, jnp.zeros_like(k)], axis=-1)
    rows = jnp.stack([v, jnp.zeros_like(v)], axis=-2)
    return jnp.matmul(columns, rows)


def _step(
    state: Array, now: Inputs, write: Callable[[Array, Array], Array] = _outer
) -> tuple[Array, Array]:
    """One step from S (b h k v): the next state and y (b h v)."""
    q, k, v, log_decay, beta = widened(now, state.dtype)
    if log_decay is not None:
        state = jnp.exp(log_decay)[..., None] * state
    if beta is not None:
        v = beta * (v - _read(state, k))
    state = state + write(k, v)
    return state, _read(state, q)


def _read(state: Array, q: Array) -> Array:
    """S^T q as a product: a sum over rows takes ten times as long on CPU."""
    return jnp.matmul(q[..., None, :], state)[..., 0, :]


def _sequential(inputs: Inputs, state: Array, chunk: int) -> tuple[Array, Array]:
    """One step after the other. The gradient keeps the states between chunks, and computes those
    inside of one chunk again at a time.
    """
    time, heads = inputs.v.shape[1:3]
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in inputs[:2])
    inputs = inputs._replace(q=q, k=k)
    if time == 1:
        with precision(inputs):
            last, y = _step(state, jax.tree.map(lambda x: x[:, 0], inputs), write=_outer_apart)
        return y[:, None], last

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def stretch(state: Array, steps: Inputs) -> tuple[Array, Array]:
        return lax.scan(_step, state, steps)

    chunk = whole_chunk(time, chunk)
    # (n c b h ...): a step reads one stretch of memory
    chunks = jax.tree.map(lambda x: jnp.moveaxis(x, (1, 3), (0, 1)), to_chunks(inputs, chunk))
    with precision(inputs):
        last, y = lax.scan(stretch, state, chunks)
    return from_chunks(jnp.moveaxis(y, (0, 1), (1, 3)), time), last
