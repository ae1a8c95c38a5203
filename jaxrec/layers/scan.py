"""Scans as layers call them: over all devices among which time is split."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrec.config import above, at_least
from jaxrec.layers.axes import time_axis
from jaxrec.ops import notes
from jaxrec.ops.newton import NewtonInfo, newton_scan, slstm_newton_scan, stability
from jaxrec.ops.newton.checks import Method as NewtonMethod
from jaxrec.ops.newton.plan import windows
from jaxrec.ops.newton.stability import row_residuals
from jaxrec.ops.newton.structure import Kind, Step
from jaxrec.ops.time import (
    MLSTMState,
    SLSTMState,
    linear_scan,
    matrix_scan,
    mlstm_scan,
    selective_scan,
    sharded_linear_scan,
    sharded_matrix_scan,
    sharded_selective_scan,
    slstm_scan,
    wkv,
)
from jaxrec.ops.time.matrix_scan import Rule
from jaxrec.ops.time.scan import delayed
from jaxrec.ops.time.wkv import WKVState


def scan_over_time(
    a: Array,
    b: Array,
    h0: Array | None = None,
    *,
    reverse: bool = False,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """`linear_scan`, by `sharded_linear_scan` where the current mesh splits time into equal parts.

    Left to the compiler, a scan over an axis that is split gathers the whole sequence.
    """
    axis = time_axis(b.shape[1])
    scan = linear_scan if axis is None else functools.partial(sharded_linear_scan, axis=axis)
    h, last = scan(a, b, h0, reverse=reverse, reset=reset)
    notes.note("decay", a)
    notes.note("memory", last)
    return h, last


def selective_scan_over_time(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    state: Array | None = None,
    *,
    reset: Array | None = None,
) -> tuple[Array, Array]:
    """`selective_scan`, by `sharded_selective_scan` where the mesh splits time into equal parts."""
    axis = time_axis(x.shape[1])
    scan = selective_scan if axis is None else functools.partial(sharded_selective_scan, axis=axis)
    y, last = scan(x, dt, a, b, c, state, reset=reset)
    notes.note("decay", lambda: jnp.exp(dt[..., None] * a[None, None]))
    notes.note("memory", last)
    return y, last


def wkv_over_time(
    k: Array,
    v: Array,
    rate: Array,
    bonus: Array,
    state: WKVState | None = None,
    *,
    reset: Array | None = None,
) -> tuple[Array, WKVState]:
    """`wkv`, over the devices among which the mesh splits time into equal parts."""
    y, last = wkv(k, v, rate, bonus, state, reset=reset, axis=time_axis(k.shape[1]))
    notes.note("decay", lambda: jnp.exp(-rate))
    return y, last


def matrix_scan_over_time(
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
) -> tuple[Array, Array]:
    """`matrix_scan`, by `sharded_matrix_scan` where the mesh splits time into equal parts."""
    axis = time_axis(q.shape[1])
    scan = matrix_scan if axis is None else functools.partial(sharded_matrix_scan, axis=axis)
    y, last = scan(
        q,
        k,
        v,
        log_decay,
        state,
        beta=beta,
        rule=rule,
        normalise=normalise,
        reset=reset,
        chunk=chunk,
    )
    if log_decay is not None:
        notes.note("decay", functools.partial(jnp.exp, log_decay))
    notes.note("memory", last)
    return y, last


def mlstm_over_time(
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
) -> tuple[Array, MLSTMState]:
    """`mlstm_scan`, over the devices among which the mesh splits time into equal parts."""
    axis = time_axis(q.shape[1])
    notes.note("decay", lambda: jnp.exp(log_forget))
    return mlstm_scan(
        q, k, v, input_gate, log_forget, state, reset=reset, chunk=chunk, eps=eps, axis=axis
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """How a nonlinear recurrence is run, see `newton_scan`; the results are the same."""

    method: NewtonMethod = "auto"
    max_iters: int | None = None
    tol: float | None = None
    window: int | None = None  # steps that are solved at once; not where time is spread
    relaxation: float = 1.0  # what part of each increment is taken
    clip: float | None = None  # of the iteration's Jacobian
    variance: float = 1e6  # of the filter's observations, for the elk methods

    def __post_init__(self) -> None:
        above(self, 0, "relaxation", "clip", "variance")
        for field in ("max_iters", "window"):
            if getattr(self, field) is not None:
                at_least(self, 1, field)


WHAT_PAYS = Solver()
"""One step after another on CPU, Newton's method elsewhere."""


def newton_over_time(
    step: Step,
    params: Any,
    x: Any,
    h0: Array,
    *,
    jacobian: Kind | Step | None,
    reset: Array | None = None,
    solver: Solver,
    safeguard: bool = True,
) -> tuple[Array, NewtonInfo]:
    """`newton_scan` of a cell that is known to have this Jacobian, over the devices among which the
    mesh splits time into equal parts.
    """
    axis = time_axis(jax.tree.leaves(x)[0].shape[1])

    def run(solver: Solver) -> tuple[Array, NewtonInfo]:
        options = dataclasses.asdict(solver)
        if axis is not None:
            options["window"] = None
        return newton_scan(
            step,
            params,
            x,
            h0,
            jacobian=jacobian,
            reset=reset,
            safeguard=safeguard,
            check=False,
            axis=axis,
            **options,
        )

    def both() -> tuple[Array, Array]:
        return run(_iterating(solver))[0], run(Solver(method="sequential"))[0]

    h, info = run(solver)
    notes.note("memory", h[:, -1])
    notes.note("solved", both)
    return h, info


def _iterating(solver: Solver) -> Solver:
    """The solver, or Newton's method in place of what would run the steps one by one."""
    if solver.method in ("auto", "sequential"):
        return dataclasses.replace(solver, method="newton")
    return solver


def note_gates(
    step: Callable[..., tuple[Array, tuple[Array, ...]]] | None,
    params: Any,
    u: Array,
    h0: Array,
    h: Array,
    reset: Array | None,
) -> None:
    """Notes the gates of a cell that has been run, all steps at once.

    Args:
      step: the cell with its gates, see `ops.cells`; None: it has none.
      params: of the cell.
      u: what it read, (b t g d).
      h0: the state before the first step, (b ...).
      h: those behind each, (b t ...).
      reset: bool (b t), True where a document begins.
    """
    if step is None:
        return

    def gates() -> Array:
        before = delayed(h, h0.astype(h.dtype))
        if reset is not None:
            at_reset = reset.reshape(reset.shape + (1,) * (h.ndim - 2))
            before = jnp.where(at_reset, jnp.zeros((), h.dtype), before)
        each = jax.vmap(lambda h, u: step(params, h, u)[1], in_axes=1, out_axes=1)
        return jnp.stack(each(before, u.astype(h.dtype)))

    notes.note("gate", gates)


def slstm_over_time(
    x: Array,
    recurrent: Array,
    state: SLSTMState | None = None,
    *,
    reset: Array | None = None,
    solver: Solver,
) -> tuple[Array, SLSTMState]:
    """`slstm_scan`, by `slstm_newton_scan` where the solver names a method that iterates: the
    matrices of a head cost more than they save almost everywhere, so that "auto" is sequential.
    """
    if solver.method in ("auto", "sequential"):
        return slstm_scan(x, recurrent, state, reset=reset)
    axis = time_axis(x.shape[1])
    options = dataclasses.asdict(solver)
    if axis is not None:
        options["window"] = None
    h, state, _ = slstm_newton_scan(x, recurrent, state, reset=reset, axis=axis, **options)
    return h, state


def newton_measures(
    step: Step,
    params: Any,
    x: Any,
    h0: Array,
    *,
    jacobian: Kind,
    reset: Array | None = None,
    solver: Solver,
) -> dict[str, Array]:
    """How Newton's method fares with a cell on these inputs, whatever method the solver names if it
    would run the steps one by one.

    Returns:
      Scalars: newton_iterations, of the window that takes most; newton_residual, the largest that
      is left, relative; newton_residual_median and newton_residual_p90, over the rows of the batch,
      of the largest residual that a row has where no window is run step by step;
      newton_unsettled_share, of rows in which that is too large; newton_fallback_share, of
      windows that do not settle and are run one step after another; max_jacobian, the largest
      |dh_t / dh_{t-1}|; lyapunov, see `ops.newton.stability`.
    """
    solver = _iterating(solver)
    h, info = newton_over_time(step, params, x, h0, jacobian=jacobian, reset=reset, solver=solver)
    time = h.shape[1]
    count = 1 if time_axis(time) is not None else windows(time, solver.window)
    found = stability(step, params, x, h0, h, jacobian=jacobian, reset=reset)

    def unaided() -> Array:
        options: dict[str, Any] = {"jacobian": jacobian, "reset": reset, "solver": solver}
        return newton_over_time(step, params, x, h0, safeguard=False, **options)[0]

    iterated = jax.lax.cond(info.converged, lambda: h, notes.silently(unaided))
    residual = row_residuals(step, params, x, h0, iterated, reset=reset)
    limit = 4 * float(jnp.finfo(residual.dtype).eps) if solver.tol is None else solver.tol
    return {
        "newton_iterations": info.iterations,
        "newton_residual": info.residual,
        "newton_residual_median": jnp.quantile(residual, 0.5, method="higher"),
        "newton_residual_p90": jnp.quantile(residual, 0.9, method="higher"),
        "newton_unsettled_share": jnp.mean((residual > limit).astype(jnp.float32)),
        "newton_fallback_share": info.fallbacks.astype(jnp.float32) / count,
        "max_jacobian": found.largest,
        "lyapunov": found.exponent,
    }
