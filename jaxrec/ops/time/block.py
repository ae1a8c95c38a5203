"""The linear recurrence whose transition is a small matrix, h_t = A_t h_{t-1} + b_t.

The matrices (m m) come first and channels last: every trailing position has matrices of its own.
The gradient is written by hand and is the same recurrence run backwards: with g_t the cotangent of
h_t, and g_T also holding that of the last state,

    db_t = g_t + A_{t+1}^T db_{t+1},    dA_t = db_t h_{t-1}^T,    dh_0 = A_1^T db_1.

Blelloch, Prefix sums and their applications (1990), section 1.4; as the linear step of Newton's
method Lim et al. (2023), arXiv:2309.12252, section 3.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrec.ops.kept import kept
from jaxrec.ops.time.loop import over_time
from jaxrec.ops.time.scan import Method, shifted

LARGEST_UNROLLED = 4
"""Products of matrices up to this size are sums over their columns, larger ones are `einsum`."""


def block_scan(
    a: Array,
    b: Array,
    h0: Array | None = None,
    *,
    reverse: bool = False,
    reset: Array | None = None,
    method: Method = "auto",
) -> tuple[Array, Array]:
    """Runs h_t = A_t h_{t-1} + b_t over the time axis.

    Args:
      a: transition, dimensionless, (b t m m ...): the row is the output.
      b: input, in the unit of the state, (b t m ...), t >= 1.
      h0: state before the first step, (b m ...); zero if None. With `reverse` it is the state after
        the last step.
      reverse: run from the last step to the first, h_t = A_t h_{t+1} + b_t.
      reset: bool (b t). True: the state that enters this step, in the direction of the scan, is
        zero.
      method: "sequential" is one pass over time of products with vectors; "associative" has
        O(log t) depth, products of matrices and a trace that grows with log t; "chunked" has
        O(sqrt t) depth in two passes; "auto" is sequential on CPU and chunked on accelerators.

    Returns:
      h (b t m ...) and the last state in the direction of the scan, (b m ...), float32 (float64 for
      such inputs).

    Raises:
      ValueError: shapes or dtypes do not fit, t is 0, or the method is unknown.
    """
    if method not in get_args(Method):
        raise ValueError(f"block_scan: method must be one of {get_args(Method)}, got {method!r}.")
    dtype = _check(a, b, h0, reset)
    trailing = b.shape[3:]
    a, b = (x.astype(dtype).reshape(*x.shape[: x.ndim - len(trailing)], -1) for x in (a, b))
    h0 = jnp.zeros_like(b[:, 0]) if h0 is None else h0.astype(dtype).reshape(b[:, 0].shape)
    if reset is not None:
        a = jnp.where(reset[:, :, None, None, None], jnp.zeros((), dtype), a)
    h, last = run(a, b, h0, reverse, method)
    return h.reshape(*h.shape[:-1], *trailing), last.reshape(*last.shape[:-1], *trailing)


def _check(a: Array, b: Array, h0: Array | None, reset: Array | None) -> jnp.dtype:
    """Refuses what does not fit; returns the dtype in which the recurrence runs."""
    if b.ndim < 3 or b.shape[1] == 0:
        raise ValueError(f"block_scan: b must be (b t m ...) with t >= 1, got shape {b.shape}.")
    wanted = (*b.shape[:3], *b.shape[2:])
    if a.shape != wanted:
        raise ValueError(f"block_scan: a must be (b t m m ...) = {wanted}, got {a.shape}.")
    state = b.shape[:1] + b.shape[2:]
    if h0 is not None and h0.shape != state:
        raise ValueError(f"block_scan: h0 must be (b m ...) = {state}, got {h0.shape}.")
    if reset is not None and (reset.shape != b.shape[:2] or reset.dtype != jnp.bool_):
        raise ValueError(
            f"block_scan: reset must be bool (b t) = {b.shape[:2]}, got {reset.dtype}"
            f" {reset.shape}."
        )
    given = [x for x in (a, b, h0) if x is not None]
    for x in given:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"block_scan: a, b and h0 must be real floats, got {x.dtype}.")
    is_double = any(x.dtype == jnp.float64 for x in given)
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def apply(a: Array, h: Array) -> Array:
    """A h for matrices (... m m n) and states (... m n)."""
    size = a.shape[-2]
    if size > LARGEST_UNROLLED:
        return jnp.einsum("...ijn,...jn->...in", a, h, precision="highest")
    terms = (a[..., j, :] * h[..., j, None, :] for j in range(size))
    return functools.reduce(jnp.add, terms)


def compose(later: Array, earlier: Array) -> Array:
    """The product of matrices (... m m n)."""
    size = later.shape[-2]
    if size > LARGEST_UNROLLED:
        return jnp.einsum("...ijn,...jkn->...ikn", later, earlier, precision="highest")
    terms = (later[..., j, None, :] * earlier[..., None, j, :, :] for j in range(size))
    return functools.reduce(jnp.add, terms)


def transposed(a: Array) -> Array:
    """The transposes of matrices (... m m n)."""
    return jnp.swapaxes(a, -3, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def run(a: Array, b: Array, h0: Array, reverse: bool, method: Method) -> tuple[Array, Array]:
    """The recurrence alone, with its gradient; a (b t m m n), b (b t m n), h0 (b m n)."""
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


def _forward(a, b, h0, reverse, method):  # type: ignore[no-untyped-def]
    h, last = kept(run(a, b, h0, reverse, method))
    return (h, last), (a, h, h0)


def _backward(reverse, method, residuals, cotangents):  # type: ignore[no-untyped-def]
    a, h, h0 = residuals
    dh, dlast = cotangents
    db, dh0 = run_adjoint(a, dh, dlast, reverse, method)
    before = shifted(h, h0, towards_start=reverse)
    return db[..., None, :] * before[:, :, None], db, dh0


run.defvjp(_forward, _backward)


def run_adjoint(
    a: Array, dh: Array, dlast: Array, reverse: bool, method: Method
) -> tuple[Array, Array]:
    """db and dh0 of `run`: the recurrence backwards, with the matrix of the step that follows."""
    matrix = transposed(a)
    edge = jnp.broadcast_to(jnp.eye(a.shape[-2], dtype=a.dtype)[None, :, :, None], a[:, 0].shape)
    db, first = run(
        shifted(matrix, edge, towards_start=not reverse), dh, dlast, not reverse, method
    )
    return db, apply(matrix[:, -1 if reverse else 0], first)


def _sequential(a: Array, b: Array, h0: Array, *, reverse: bool) -> tuple[Array, Array]:
    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        a_t, b_t = inputs
        h = apply(a_t, h) + b_t
        return h, h

    last, h = over_time(step, h0, (a, b), reverse=reverse)
    return h, last


Maps = tuple[Array, Array]


def _combine(left: Maps, right: Maps) -> Maps:
    """The map h -> A h + b of `left` followed by that of `right`."""
    return compose(right[0], left[0]), apply(right[0], left[1]) + right[1]


def _associative(a: Array, b: Array, h0: Array, *, reverse: bool) -> tuple[Array, Array]:
    product, h = lax.associative_scan(_combine, (a, b), axis=1, reverse=reverse)
    h = apply(product, jnp.broadcast_to(h0[:, None], h.shape)) + h
    return h, h[:, 0 if reverse else -1]


def total(a: Array, b: Array, *, reverse: bool = False) -> Maps:
    """The map of all steps together, (b m m n) and (b m n): h -> A h + b."""
    identity = jnp.broadcast_to(
        jnp.eye(a.shape[-2], dtype=a.dtype)[None, :, :, None], a[:, 0].shape
    )

    def step(carry: Maps, inputs: Maps) -> tuple[Maps, None]:
        return _combine(carry, inputs), None

    return over_time(step, (identity, jnp.zeros_like(b[:, 0])), (a, b), reverse=reverse)[0]


def _chunked(a: Array, b: Array, h0: Array, *, reverse: bool) -> tuple[Array, Array]:
    """The maps of all chunks at once, then what enters each, then all chunks at once again: reads
    A twice, but writes no product of every step.
    """
    if reverse:
        h, last = _chunked(jnp.flip(a, 1), jnp.flip(b, 1), h0, reverse=False)
        return jnp.flip(h, 1), last
    batch, time, size, width = b.shape
    length = max(1, int(time**0.5))
    chunks = -(-time // length)
    rest = chunks * length - time
    # The identity at the end leaves the last state where it is.
    eye = jnp.broadcast_to(
        jnp.eye(size, dtype=a.dtype)[None, None, :, :, None], (batch, rest, size, size, width)
    )
    a = jnp.concatenate([a, eye], axis=1).reshape(batch * chunks, length, size, size, width)
    b = jnp.concatenate([b, jnp.zeros((batch, rest, size, width), b.dtype)], axis=1)
    b = b.reshape(batch * chunks, length, size, width)
    products, ends = total(a, b)
    carried, last = _sequential(
        products.reshape(batch, chunks, size, size, width),
        ends.reshape(batch, chunks, size, width),
        h0,
        reverse=False,
    )
    entering = shifted(carried, h0, towards_start=False).reshape(batch * chunks, size, width)
    h, _ = _sequential(a, b, entering, reverse=False)
    return h.reshape(batch, chunks * length, size, width)[:, :time], last
