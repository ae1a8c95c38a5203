"""The linear recurrence with a diagonal transition, h_t = a_t * h_{t-1} + b_t, parallel over time.

Three methods compute the same numbers. The gradient is written by hand and is the same recurrence
run backwards: with g_t the cotangent of h_t and g_T also holding that of the last state,

    db_t = g_t + a_{t+1} * db_{t+1},    da_t = db_t * h_{t-1},    dh_0 = a_1 * db_1.

Martin & Cundy, Parallelizing linear recurrent neural nets over sequence length (2018),
arXiv:1709.04057.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.kept import kept
from jaxrec.ops.time.loop import over_time

Method = Literal["auto", "sequential", "associative", "chunked"]


def linear_scan(
    a: Array,
    b: Array,
    h0: Array | None = None,
    *,
    reverse: bool = False,
    reset: Array | None = None,
    method: Method = "auto",
) -> tuple[Array, Array]:
    """Runs h_t = a_t * h_{t-1} + b_t over the time axis.

    Args:
      a: decay, dimensionless, (b t ...), float or complex, or any shape that broadcasts to b's; |a|
        <= 1 keeps the state bounded. More is not refused, and ends in inf: `discretize.is_stable`
        tells of a transition whether it is stable.
      b: input, in the unit of the state, (b t ...) with any trailing axes, t >= 1.
      h0: state before the first step, (b ...); zero if None. With `reverse` it is the state after
        the last step.
      reverse: run from the last step to the first, h_t = a_t * h_{t+1} + b_t.
      reset: bool, (b t). True: the state that enters this step, in the direction of the scan, is
        zero. It is a decay of zero: a state that has overflowed to infinity is not stopped by it.
      method: "sequential" is one pass over time with the least memory; "associative" has O(log t)
        depth and a trace that grows with log t; "chunked" has O(sqrt t) depth in three passes;
        "auto" is sequential on CPU and chunked on accelerators.

    Returns:
      h, shaped as b, in the dtype that a and b promote to; and the last state in the direction of
      the scan, (b ...), float32 or complex64 (float64, complex128 for such inputs), ready to be the
      next call's h0. The recurrence itself runs in the dtype of the state.

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, or the method is unknown.
    """
    return run(*prepare(a, b, h0, reset, method), reverse, method)


def prepare(
    a: Array, b: Array, h0: Array | None, reset: Array | None, method: Method
) -> tuple[Array, Array, Array]:
    """The arguments of `run` from those of `linear_scan`, checked: a as large as b and zero at
    resets.
    """
    if method not in get_args(Method):
        raise ValueError(f"linear_scan: method must be one of {get_args(Method)}, got {method!r}.")
    dtype, state_dtype = _dtypes(a, b)
    a, b, h0, reset = _check(a, b, h0, reset)
    if reset is not None:
        a = jnp.where(reset.reshape(reset.shape + (1,) * (b.ndim - 2)), jnp.zeros((), a.dtype), a)
    if h0 is None:
        h0 = jnp.zeros_like(b[:, 0], dtype=state_dtype)
    return a.astype(dtype), b.astype(dtype), h0.astype(state_dtype)


def _dtypes(a: Array, b: Array) -> tuple[jnp.dtype, jnp.dtype]:
    """The dtype of h, and the wider one in which the state is kept."""
    with jax.numpy_dtype_promotion("standard"):  # widening is what this function promises
        dtype = jnp.promote_types(a.dtype, b.dtype)
        state_dtype = jnp.promote_types(dtype, jnp.float32)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"linear_scan: a and b must be float or complex, got {a.dtype} and {b.dtype}."
        )
    return dtype, state_dtype


def _check(
    a: Array, b: Array, h0: Array | None, reset: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    if b.ndim < 2:
        raise ValueError(f"linear_scan: b must be (b t ...), got shape {b.shape}.")
    if b.shape[1] == 0:
        raise ValueError(
            f"linear_scan: needs at least one step, got t = 0 in b of shape {b.shape}."
        )
    try:
        a = jnp.broadcast_to(a, b.shape)
    except ValueError:
        raise ValueError(
            f"linear_scan: a must broadcast to b (b t ...), got {a.shape} and {b.shape}."
            " For a decay shared over trailing axes, add axes of size 1 first."
        ) from None
    state_shape = b.shape[:1] + b.shape[2:]
    if h0 is not None and h0.shape != state_shape:
        raise ValueError(f"linear_scan: h0 must be (b ...) = {state_shape}, got {h0.shape}.")
    if (
        h0 is not None
        and jnp.iscomplexobj(h0)
        and not jnp.iscomplexobj(a)
        and not jnp.iscomplexobj(b)
    ):
        raise ValueError(f"linear_scan: h0 is {h0.dtype} while a and b are real; make b complex.")
    if reset is not None and (reset.shape != b.shape[:2] or reset.dtype != jnp.bool_):
        raise ValueError(
            f"linear_scan: reset must be bool (b t) = {b.shape[:2]},"
            f" got {reset.dtype} {reset.shape}."
        )
    return a, b, h0, reset


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def run(a: Array, b: Array, h0: Array, reverse: bool, method: Method) -> tuple[Array, Array]:
    """The recurrence alone, with its gradient; a and b (b t ...) alike, h0 (b ...)."""
    if method == "auto":
        return lax.platform_dependent(
            a,
            b,
            h0,
            cpu=functools.partial(_sequential, reverse=reverse),
            default=functools.partial(_chunked, reverse=reverse),
        )
    form = {"sequential": _sequential, "associative": _associative, "chunked": _chunked}[method]
    return form(a, b, h0, reverse=reverse)


def _scan_forward(a, b, h0, reverse, method):  # type: ignore[no-untyped-def]
    h, last = kept(run(a, b, h0, reverse, method))
    return (h, last), (a, h, h0)


def _scan_backward(reverse, method, residuals, cotangents):  # type: ignore[no-untyped-def]
    a, h, h0 = residuals
    dh, dlast = cotangents
    db, dh0 = run_adjoint(a, dh, dlast, reverse, method)
    h_before = shifted(h, h0.astype(h.dtype), towards_start=reverse)
    return db * h_before, db, dh0


run.defvjp(_scan_forward, _scan_backward)


def run_adjoint(
    a: Array, dh: Array, dlast: Array, reverse: bool, method: Method
) -> tuple[Array, Array]:
    """db and dh0 of `run` from the cotangents of h and of the last state."""
    if method == "auto":
        return lax.platform_dependent(
            a,
            dh,
            dlast,
            cpu=functools.partial(_sequential_adjoint, reverse=reverse),
            default=functools.partial(_adjoint, reverse=reverse, method="chunked"),
        )
    if method == "sequential":
        return _sequential_adjoint(a, dh, dlast, reverse=reverse)
    return _adjoint(a, dh, dlast, reverse=reverse, method=method)


def _adjoint(
    a: Array, dh: Array, dlast: Array, *, reverse: bool, method: Method
) -> tuple[Array, Array]:
    """db and dh0: the recurrence run backwards, with the decay of the step that follows."""
    decay = shifted(a, jnp.ones_like(a[:, 0]), towards_start=not reverse)
    db, first = run(decay, dh, dlast, not reverse, method)
    return db, a[:, -1 if reverse else 0].astype(first.dtype) * first


def _sequential_adjoint(a: Array, dh: Array, dlast: Array, *, reverse: bool) -> tuple[Array, Array]:
    """The same in one loop, which multiplies after it has added: no shifted copy of a is made."""

    def step(carry: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a_t, dh_t = inputs
        db = dh_t.astype(carry.dtype) + carry
        return a_t.astype(carry.dtype) * db, db.astype(dh.dtype)

    dh0, db = over_time(step, dlast, (a, dh), reverse=not reverse)
    return db, dh0


def shifted(x: Array, edge: Array, *, towards_start: bool) -> Array:
    """x moved by one step along time; `edge` (b ...) enters at the side that became free."""
    if towards_start:
        return jnp.concatenate([x[:, 1:], edge[:, None]], axis=1)
    return jnp.concatenate([edge[:, None], x[:, :-1]], axis=1)


def delayed(x: Array, first: Array) -> Array:
    """x (b t ...) one step later, `first` (b ...) before it: `shifted` for arrays whose time is
    split over devices. There a concatenation gathers the sequence, while of padding the last steps
    travel to the neighbours.
    """
    none = [(0, 0, 0)] * x.ndim
    later = lax.pad(x, jnp.zeros((), x.dtype), [none[0], (1, -1, 0), *none[2:]])
    return jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) == 0, first[:, None], later)


def _sequential(a: Array, b: Array, h0: Array, *, reverse: bool) -> tuple[Array, Array]:
    """One pass over time, in the dtype of the state."""

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a_t, b_t = inputs
        h = a_t.astype(h.dtype) * h + b_t.astype(h.dtype)
        return h, h.astype(b.dtype)

    last, h = over_time(step, h0, (a, b), reverse=reverse)
    return h, last


def _combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """The map h -> a h + b of `left` followed by that of `right`."""
    return left[0] * right[0], right[0] * left[1] + right[1]


def _associative(a: Array, b: Array, h0: Array, *, reverse: bool) -> tuple[Array, Array]:
    """O(log t) depth: prefix products of the affine maps, then applied to h0."""
    decay, h = lax.associative_scan(
        _combine, (a.astype(h0.dtype), b.astype(h0.dtype)), axis=1, reverse=reverse
    )
    h = decay * h0[:, None] + h
    return h.astype(b.dtype), h[:, 0 if reverse else -1]


def _chunked(a: Array, b: Array, h0: Array, *, reverse: bool) -> tuple[Array, Array]:
    """O(sqrt t) depth: all chunks at once from zero, then the carries, then what they add."""
    if reverse:
        h, last = _chunked(jnp.flip(a, 1), jnp.flip(b, 1), h0, reverse=False)
        return jnp.flip(h, 1), last
    batch, time, *rest = b.shape
    length = max(1, int(time**0.5))
    chunks = -(-time // length)
    padding = [(0, 0), (0, chunks * length - time)] + [(0, 0)] * len(rest)
    # Padding with the identity map (a = 1, b = 0) leaves the last state where it is.
    a = jnp.pad(a, padding, constant_values=1).reshape(batch * chunks, length, *rest)
    b_padded = jnp.pad(b, padding).reshape(batch * chunks, length, *rest)

    def step(carry: tuple[Array, Array], inputs: tuple[Array, Array]):  # type: ignore[no-untyped-def]
        inputs = jax.tree.map(lambda x: x.astype(h0.dtype), inputs)
        carry = _combine(carry, inputs)
        return carry, carry

    identity = (jnp.ones_like(a[:, 0], dtype=h0.dtype), jnp.zeros_like(a[:, 0], dtype=h0.dtype))
    (decays, ends), (decay, h) = lax.scan(
        step, identity, (jnp.swapaxes(a, 0, 1), jnp.swapaxes(b_padded, 0, 1))
    )
    ends_shape = (batch, chunks, *rest)
    carried, last = _sequential(
        decays.reshape(ends_shape), ends.reshape(ends_shape), h0, reverse=False
    )
    entering = shifted(carried, h0, towards_start=False).reshape(batch * chunks, *rest)
    h = jnp.swapaxes(h + decay * entering[None], 0, 1).reshape(batch, chunks * length, *rest)
    return h[:, :time].astype(b.dtype), last
