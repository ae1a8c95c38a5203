"""The selective scan of Mamba: a diagonal recurrence whose decay, input and read-out depend on the
input, with a state n times as wide as the input, which never exists for more than a few steps.

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t,   y_t = sum_n c_t h_t

The forward pass keeps the states at the borders of chunks of time. The gradient is written by hand:
it goes through the chunks from the last to the first, computes the states of one chunk again, and
runs the adjoint recurrence. With D_t = exp(dt_t a) and g_t the gradient to h_t,

    g_t = c_t dy_t + D_{t+1} g_{t+1},   dc_t = sum_e h_t dy_t,   db_t = sum_e g_t dt_t x_t,
    dx_t = dt_t sum_n g_t b_t,   ddt_t = x_t sum_n g_t b_t + sum_n a D_t h_{t-1} g_t,
    da = sum_{b,t} dt_t D_t h_{t-1} g_t.

Gu & Dao, Mamba: linear-time sequence modeling with selective state spaces (2023), arXiv:2312.00752,
algorithm 2 and section 3.3.2.
"""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.ops.kept import kept
from jaxrec.ops.time.scan import linear_scan

Method = Literal["auto", "sequential", "chunked"]


class _Inputs(NamedTuple):
    """What one step takes, or a stretch of steps, which is then the leading axis."""

    x: Array  # (b e)
    dt: Array  # (b e)
    b: Array  # (b n)
    c: Array  # (b n)
    drop: Array | None  # (b): 1 where the state that enters is zero, else 0; None: 0 everywhere


def selective_scan(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    state: Array | None = None,
    *,
    reset: Array | None = None,
    chunk: int = 32,
    method: Method = "auto",
) -> tuple[Array, Array]:
    """Runs h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t and reads y_t = sum_n c_t h_t.

    Args:
      x: input (b t e), t >= 1.
      dt: step size (b t e), >= 0, in the unit of time of which `a` is the inverse.
      a: rate (e n); <= 0 keeps the state bounded.
      b: how the input enters the state, (b t n).
      c: how the state is read, (b t n).
      state: h before the first step, (b e n) float32; zero if None.
      reset: bool (b t). True: the state that enters this step is zero. It is a decay of zero: a
        state that has overflowed to infinity is not stopped by it.
      chunk: steps whose states exist at the same time; the gradient keeps t / chunk states, and
        computes `chunk` of them again at a time.
      method: "sequential" is one loop over time with few and cheap operations a step; "chunked" has
        depth t / chunk * log(chunk) and does all steps of a chunk at once; "auto" is sequential on
        CPU and chunked on accelerators.

    Returns:
      y (b t e) in x's dtype, and the last state (b e n), float32 (float64 for such inputs), ready
      to be the next call's `state`. The recurrence itself runs in the dtype of the state.

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, chunk is below 1, the method is unknown, or a
        step size is negative. Under `jit`, where its value is not known, that grows the state.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"selective_scan: method must be one of {get_args(Method)}, got {method!r}."
        )
    if chunk < 1:
        raise ValueError(f"selective_scan: chunk must be >= 1, got {chunk}.")
    wide = _check(x, dt, a, b, c, state, reset)
    batch, time, inner = x.shape
    chunk = min(chunk, time)
    if state is None:
        state = jnp.zeros_like(x, wide, shape=(batch, inner, a.shape[1]))
    drop = None if reset is None else reset.astype(wide)
    inputs = _Inputs(x.astype(wide), dt.astype(wide), b.astype(wide), c.astype(wide), drop)
    # Inside, time comes first, so that a step reads one stretch of memory, and channels come last:
    # there are more of them than states, and a step runs along them.
    chunks = jax.tree.map(functools.partial(_to_chunks, chunk=chunk), inputs)
    y, last = _scan(chunks, a.astype(wide).T, jnp.swapaxes(state.astype(wide), 1, 2), method)
    y = jnp.swapaxes(y.reshape(y.shape[0] * chunk, batch, inner)[:time], 0, 1)
    return y.astype(x.dtype), jnp.swapaxes(last, 1, 2)


def _check(
    x: Array, dt: Array, a: Array, b: Array, c: Array, state: Array | None, reset: Array | None
) -> jnp.dtype:
    """Refuses what does not fit; returns the dtype in which the recurrence runs."""
    for name, z in (("x", x), ("dt", dt), ("a", a), ("b", b), ("c", c), ("state", state)):
        if z is not None and not jnp.issubdtype(z.dtype, jnp.floating):
            raise ValueError(f"selective_scan: {name} must be real floats, got {z.dtype}.")
    if x.ndim != 3:
        raise ValueError(f"selective_scan: x must be (b t e), got shape {x.shape}.")
    batch, time, inner = x.shape
    if time == 0:
        raise ValueError(
            f"selective_scan: needs at least one step, got t = 0 in x of shape {x.shape}."
        )
    if a.ndim != 2 or a.shape[0] != inner:
        raise ValueError(
            f"selective_scan: a must be (e n) with e = {inner} as in x, got {a.shape}."
        )
    size = a.shape[1]
    wanted = {
        "dt": (dt, "(b t e)", x.shape),
        "b": (b, "(b t n)", (batch, time, size)),
        "c": (c, "(b t n)", (batch, time, size)),
        "state": (state, "(b e n)", (batch, inner, size)),
    }
    for name, (z, letters, shape) in wanted.items():
        if z is not None and z.shape != shape:
            raise ValueError(f"selective_scan: {name} must be {letters} = {shape}, got {z.shape}.")
    if reset is not None and (reset.shape != (batch, time) or reset.dtype != jnp.bool_):
        raise ValueError(
            f"selective_scan: reset must be bool (b t) = {(batch, time)},"
            f" got {reset.dtype} {reset.shape}."
        )
    if not isinstance(dt, jax.core.Tracer) and np.any(np.asarray(dt) < 0):
        raise ValueError(f"selective_scan: dt must be >= 0, got {np.min(np.asarray(dt))}.")
    is_double = any(z is not None and z.dtype == jnp.float64 for z in (x, dt, a, b, c, state))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def _to_chunks(z: Array, chunk: int) -> Array:
    """(b t ...) to (t/c c b ...). Steps of size 0 fill the last chunk: they leave states alone."""
    z = jnp.swapaxes(z, 0, 1)
    chunks = -(-z.shape[0] // chunk)
    z = jnp.pad(z, [(0, chunks * chunk - z.shape[0])] + [(0, 0)] * (z.ndim - 1))
    return z.reshape(chunks, chunk, *z.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(chunks: _Inputs, a: Array, state: Array, method: Method) -> tuple[Array, Array]:
    """The scan on chunks (t/c c b ...), a (n e) and states (b n e)."""
    y, last, _ = _forward(chunks, a, state, method)
    return y, last


def _forward(chunks: _Inputs, a: Array, state: Array, method: Method) -> tuple[Array, Array, Array]:
    """y, the last state, and the states that enter each chunk."""

    def run(chunk_states: Any, chunks: _Inputs, a: Array, state: Array) -> Any:
        def body(h: Array, chunk: _Inputs) -> tuple[Array, tuple[Array, Array]]:
            last, y = chunk_states(h, chunk, a)
            return last, (y, h)

        last, (y, borders) = lax.scan(body, state, chunks)
        return y, last, borders

    return _dispatch(
        method,
        functools.partial(run, _sequential),
        functools.partial(run, _chunked),
        chunks,
        a,
        state,
    )


def _dispatch(method: Method, sequential: Any, chunked: Any, *arguments: Any) -> Any:
    if method == "auto":
        return lax.platform_dependent(*arguments, cpu=sequential, default=chunked)
    return (sequential if method == "sequential" else chunked)(*arguments)


def _scan_forward(chunks, a, state, method):  # type: ignore[no-untyped-def]
    y, last, borders = kept(_forward(chunks, a, state, method))
    return (y, last), (chunks, a, borders)


def _scan_backward(method, residuals, cotangents):  # type: ignore[no-untyped-def]
    def run(
        adjoint: Any, chunks: _Inputs, a: Array, borders: Array, dy: Array, dlast: Array
    ) -> Any:
        def body(carry: tuple[Array, Array], chunk: Any) -> Any:
            return adjoint(*carry, *chunk, a)

        start = (dlast, jnp.zeros_like(a))
        (dstate, da), gradients = lax.scan(body, start, (chunks, borders, dy), reverse=True)
        return gradients, da, dstate

    return _dispatch(
        method,
        functools.partial(run, _sequential_adjoint),
        functools.partial(run, _chunked_adjoint),
        *residuals,
        *cotangents,
    )


_scan.defvjp(_scan_forward, _scan_backward)


def _decay(step: _Inputs, a: Array) -> Array:
    """exp(dt a), zero where the state is reset: (... b n e)."""
    decay = jnp.exp(step.dt[..., None, :] * jnp.expand_dims(a, range(step.dt.ndim - 1)))
    return decay if step.drop is None else decay * (1 - step.drop[..., None, None])


def _entering(step: _Inputs) -> Array:
    """What enters the state, dt x b: (... b n e)."""
    return (step.dt * step.x)[..., None, :] * step.b[..., None]


def _sequential(h: Array, chunk: _Inputs, a: Array) -> tuple[Array, Array]:
    """The last state and y (c b e), step by step."""

    def step(h: Array, now: _Inputs) -> tuple[Array, Array]:
        h = _decay(now, a) * h + _entering(now)
        return h, _over_states(now.c, h)

    return lax.scan(step, h, chunk)


def _over_states(b: Array, h: Array) -> Array:
    """sum_n b_n h_n, (b n) and (b n e) to (b e). A product, as sums over rows are slow on CPU."""
    return jnp.matmul(b[:, None], h, precision="highest")[:, 0]


def _sequential_adjoint(
    dh: Array, da: Array, chunk: _Inputs, border: Array, dy: Array, a: Array
) -> tuple[tuple[Array, Array], _Inputs]:
    """The gradient to the state that enters, da with this chunk's share, those to its inputs."""

    def again(h: Array, now: _Inputs) -> tuple[Array, Array]:
        return _decay(now, a) * h + _entering(now), h

    _, before = lax.scan(again, border, chunk)

    def step(carry: tuple[Array, Array], inputs: Any) -> Any:
        (dh, da), (now, h, dy) = carry, inputs
        return _step_adjoint(dh, da, now, h, dy, a)

    return lax.scan(step, (dh, da), (chunk, before, dy), reverse=True)


def _step_adjoint(
    dh: Array, da: Array, now: _Inputs, before: Array, dy: Array, a: Array
) -> tuple[tuple[Array, Array], _Inputs]:
    kept = _decay(now, a)
    g = dh + now.c[..., None] * dy[:, None]
    h = kept * before + _entering(now)
    dh = kept * g
    slope = dh * before  # the gradient to dt a
    entering = _over_states(now.b, g)
    gradient = _Inputs(
        x=now.dt * entering,
        dt=now.x * entering + jnp.sum(slope * a[None], axis=-2),
        b=jnp.einsum("bne,be->bn", g, now.dt * now.x),
        c=jnp.einsum("bne,be->bn", h, dy),
        drop=None if now.drop is None else jnp.zeros_like(now.drop),
    )
    return (dh, da + jnp.sum(slope * now.dt[:, None], axis=0)), gradient


def _chunked(h: Array, chunk: _Inputs, a: Array) -> tuple[Array, Array]:
    """The last state and y (c b e), all steps at once."""
    states, last = _states(h, chunk, a)
    return last, jnp.einsum("cbne,cbn->cbe", states, chunk.c)


def _states(h: Array, chunk: _Inputs, a: Array) -> tuple[Array, Array]:
    """The states (c b n e) of all steps of a chunk, and the last one."""
    states, last = linear_scan(
        _batch_first(_decay(chunk, a)), _batch_first(_entering(chunk)), h, method="associative"
    )
    return _batch_first(states), last


def _batch_first(z: Array) -> Array:
    return jnp.swapaxes(z, 0, 1)


def _chunked_adjoint(
    dh: Array, da: Array, chunk: _Inputs, border: Array, dy: Array, a: Array
) -> tuple[tuple[Array, Array], _Inputs]:
    """As `_sequential_adjoint`, all steps at once."""
    states, _ = _states(border, chunk, a)
    before = jnp.concatenate([border[None], states[:-1]])
    kept = _decay(chunk, a)
    following = jnp.concatenate([kept[1:], jnp.ones_like(kept[:1])])
    read = chunk.c[..., None] * dy[:, :, None]
    g, _ = linear_scan(
        _batch_first(following), _batch_first(read), dh, reverse=True, method="associative"
    )
    g = _batch_first(g)
    slope = kept * g * before
    entering = jnp.einsum("cbne,cbn->cbe", g, chunk.b)
    gradient = _Inputs(
        x=chunk.dt * entering,
        dt=chunk.x * entering + jnp.einsum("cbne,ne->cbe", slope, a),
        b=jnp.einsum("cbne,cbe->cbn", g, chunk.dt * chunk.x),
        c=jnp.einsum("cbne,cbe->cbn", states, dy),
        drop=None if chunk.drop is None else jnp.zeros_like(chunk.drop),
    )
    return (kept[0] * g[0], da + jnp.einsum("cbne,cbe->ne", slope, chunk.dt)), gradient
