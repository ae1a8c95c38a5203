"""Any recurrence h_t = f(h_{t-1}, x_t), solved for all steps at once by Newton's method.

Each iteration is a linear recurrence in time, so that this is a loop in depth over scans in time:

    r = f(h_{t-1}) - h_t,   d_t = J_t d_{t-1} + r_t,   h <- h + d,   J_t = df/dh at h_{t-1}

The gradient does not pass through the iteration: at the solution it is one linear recurrence
backwards, l_t = g_t + J_{t+1}^T l_{t+1}, and one derivative of f at all steps along l. It is exact
whatever the iteration has approximated.

Lim et al., Parallelizing non-linear sequential models over the sequence length (2023),
arXiv:2309.12252 (DEER); Danieli et al., ParaRNN (2025), arXiv:2510.21450; Gonzalez et al. (2024),
arXiv:2407.19115 (quasi-DEER and ELK).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from jaxrec.ops.kept import kept
from jaxrec.ops.newton import checks, fused
from jaxrec.ops.newton import structure as structures
from jaxrec.ops.newton.adjoint import pull_back
from jaxrec.ops.newton.checks import Method
from jaxrec.ops.newton.iteration import Rules, iterate, step_by_step
from jaxrec.ops.newton.line import Line
from jaxrec.ops.newton.plan import (
    DEFAULT_WINDOW,
    Floats,
    NewtonInfo,
    Others,
    Plan,
    Split,
    windowed,
)
from jaxrec.ops.newton.structure import Kind, Step

SHORTEST_FOR_NEWTON = 32  # shorter sequences "auto" runs step by step on accelerators too
ITERATIONS = {"auto": 16, "sequential": 0, "newton": 16, "pallas": 16}
SLOW_ITERATIONS = 64  # of methods that converge linearly


def newton_scan(
    step: Step,
    params: Any,
    x: Any,
    h0: Array,
    *,
    jacobian: Kind | Step | None = None,
    method: Method = "auto",
    max_iters: int | None = None,
    tol: float | None = None,
    window: int | None = None,
    chunks: int | None = None,
    reset: Array | None = None,
    guess: Array | None = None,
    relaxation: float = 1.0,
    clip: float | None = None,
    variance: float = 1e6,
    safeguard: bool = True,
    check: bool = True,
    axis: str | None = None,
) -> tuple[Array, NewtonInfo]:
    """Runs h_t = step(params, h_{t-1}, x_t) over the time axis.

    Args:
      step: (params, h, x_t) -> h for h (b ...) and leaves of x_t (b ...); it keeps the shape of h
        and its dtype, float32 (or float64), and treats batch elements apart. What does not depend
        on h, such as a projection of the input, belongs into x, or it is computed in every
        iteration.
      params: pytree of arrays.
      x: pytree of (b t ...), t >= 1.
      h0: state before the first step, (b ...); computed with as float32 (float64 if it is that).
      jacobian: which numbers of a state mix in a step. "diagonal": none; "block": groups, along the
        first or the last axis of the state (up to 8), or else in 2 to 4 equal parts of its only
        axis; "dense": all; None: the narrowest of these that fits. Or a function of the arguments
        of `step` that gives the Jacobian, shaped as h if it is diagonal and otherwise (b m m ...),
        where h is (b m ...) or packed so.
      method: "sequential" is one step after another. "newton" converges quadratically;
        "quasi_newton" leaves out what is off the diagonal, which costs less and converges linearly;
        "elk" and "quasi_elk" damp both by a Kalman filter. "pallas" is one kernel for each window,
        for states (b d) or (b m d), m up to 4, whose d channels do not mix: Newton's method on the
        states between chunks of time, and where there are channels enough to fill a GPU a single
        chunk, step by step (`kernel`). It takes float32, and params and x of floats, of which
        belongs to channels what has d numbers in its last axis. On CPU it is interpreted. It has
        been run nowhere else: for GPUs and TPUs it is only known to lower. "auto" is sequential on
        CPU and for short sequences, otherwise Newton.
      max_iters: most iterations for one window; None: 16, or 64 where convergence is linear.
      tol: a step is settled when its residual is at most so much of the largest number of its
        state, or of 1 if that is larger; None: four times the dtype's resolution.
      window: so many steps are solved at once, windows one after another. It bounds how far an
        iterate can stray, and the memory: with a window the gradient keeps nothing but h and
        computes the rest again, also of the sequential method, which without one keeps what JAX
        keeps of a loop. None: 1024, 2048 of the kernel, or all of a device's steps where time is
        spread.
      chunks: into how many chunks of time the kernel cuts a window, a power of two up to 128. 1 is
        the recurrence itself, step by step in a kernel that keeps the state on the chip until the
        window ends. None: as many as fill a GPU; 8 on a TPU.
      reset: bool (b t). True: the state that enters this step is zero.
      guess: where the iteration begins, (b t ...); None: step(params, h, x_t) where h is zero, and
        in later windows the mean state of the window before: up to 15 % fewer iterations of cells
        that forget slowly; from the carried state itself it takes as many as from zero or up to
        half more, and fewer only with entries of N(0, 2^2) (experiments/newton_convergence). The
        kernel takes of it what enters its chunks; None: the mean state of the window before.
      relaxation: what part of each increment is taken.
      clip: the Jacobian of the iteration, not that of the gradient, is cut to [-clip, clip], or
        scaled down to this Frobenius norm.
      variance: of the filter's observations in units of a step's noise, for "elk": smaller is more
        damped.
      safeguard: a window in which some step has not settled is run sequentially, and what settled
        in it is kept. False: whatever the iteration has come to is returned.
      check: tries the structure of the Jacobian on one step, see Raises.
      axis: name of the mesh axis (`jax.set_mesh`) over which time is spread; its size divides t.
        Each solve exchanges one map of each device.

    Returns:
      h (b t ...) in the dtype of the computation, and a `NewtonInfo`, through which no gradient
      passes. Gradients reach params, x, h0 and what floats `step` closes over. On one
      device they can be differentiated once more. Forward mode (`jax.jvp`) needs the method
      "sequential" without a window; elsewhere JAX refuses it, as of all hand-written gradients.

    Raises:
      ValueError: shapes or dtypes do not fit, a number is out of range, or the Jacobian is of
        another structure than declared. That is tried along random directions with the actual
        parameters and inputs; those that are being traced (inside of `jit`) are replaced by random
        ones, at tracing, once. A step that cannot be run so is believed.
    """
    is_sharded = axis is not None
    checks.numbers(method, max_iters, window, chunks, relaxation, clip, variance, axis)
    h0 = h0.astype(jnp.float64 if h0.dtype == jnp.float64 else jnp.float32)
    time = checks.arrays(x, h0, reset, guess)
    if axis is not None:
        checks.axis(axis, time)
    epsilon = float(jnp.finfo(h0.dtype).eps)
    if tol is not None and not epsilon <= tol < jnp.inf:
        raise ValueError(
            f"newton_scan: tol must be at least {epsilon:.2e}, the resolution of {h0.dtype}, got"
            f" {tol}."
        )
    one = jax.tree.map(lambda leaf: leaf[:, 0], x)
    new = jax.eval_shape(step, params, h0, one)
    if getattr(new, "shape", None) != h0.shape or new.dtype != h0.dtype:
        raise ValueError(
            f"newton_scan: step must give a state like the one that it gets, {h0.dtype}"
            f" {h0.shape}, got {new}."
        )
    params, step, analytic = _closed(step, jacobian, params, h0, one, is_sharded=is_sharded)
    if analytic is None:
        assert not callable(jacobian)
        structure = structures.find(jacobian, step, params, h0, one, check=check)
    else:
        shape = jax.eval_shape(analytic, params, h0, one).shape
        structure = structures.of_matrices(shape[1:], h0.shape[1:])
        if check:
            structures.check_analytic(analytic, structure, step, params, h0, one)
    iterations = ITERATIONS.get(method, SLOW_ITERATIONS) if max_iters is None else max_iters
    split, floats, others = Split.of(params, x)
    default_window = fused.DEFAULT_WINDOW if method == "pallas" else DEFAULT_WINDOW
    plan = Plan(
        step=step,
        analytic=analytic,
        structure=structure,
        split=split,
        method=method,
        window=time if is_sharded else min(window or default_window, time),
        chunks=chunks,
        axis=axis,
        rules=Rules(
            max_iters=iterations,
            tol=4 * epsilon if tol is None else float(tol),
            only_diagonal=method in ("quasi_newton", "quasi_elk"),
            variance=variance if method in ("elk", "quasi_elk") else None,
            relaxation=relaxation,
            clip=clip,
            safeguard=safeguard,
        ),
    )
    if method == "pallas":
        (fused.check if check else fused.cell)(plan, params, x, h0)
    if guess is not None:
        guess = lax.stop_gradient(guess.astype(h0.dtype))
    arguments = (floats, (*others, reset, guess), h0)
    with jax.named_scope("newton_scan"):
        if is_sharded or window is not None or method not in ("auto", "sequential"):
            return _run(plan, *arguments)
        # Differentiated by JAX, a loop keeps what its gradient would compute again.
        loop = functools.partial(_sequential, plan, line=Line())
        if method == "sequential" or time < SHORTEST_FOR_NEWTON:
            return loop(*arguments)
        newton = functools.partial(_run, plan._replace(method="newton"))
        return lax.platform_dependent(*arguments, cpu=loop, default=newton)


def _closed(
    step: Step, jacobian: Any, params: Any, h0: Array, one: Any, *, is_sharded: bool
) -> tuple[Any, Step, Step | None]:
    """Step and Jacobian that take what they close over as further parameters.

    Raises:
      ValueError: they close over traced values where time is spread over devices.
    """
    analytic = jacobian if callable(jacobian) else None
    closed_step, hoisted = jax.closure_convert(step, params, h0, one)
    closed_jacobian: Any = None
    constants: Any = []
    if analytic is not None:
        closed_jacobian, constants = jax.closure_convert(analytic, params, h0, one)
    if is_sharded and (hoisted or constants):
        raise ValueError(
            "newton_scan: where time is spread over devices, step must not close over values that"
            " are being traced; give them as params."
        )

    # A function that closes over nothing is called as it is: what `closure_convert` returns is
    # bound to the mesh on which it was traced.
    def run(params: Any, h: Array, x: Any) -> Array:
        if not hoisted:
            return step(params[0], h, x)
        return closed_step(params[0], h, x, *params[1])

    def matrices(params: Any, h: Array, x: Any) -> Array:
        if not constants:
            assert analytic is not None
            return analytic(params[0], h, x)
        return closed_jacobian(params[0], h, x, *params[2])

    all_params = (params, tuple(hoisted), tuple(lax.stop_gradient(constants)))
    return all_params, run, None if analytic is None else matrices


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan: Plan, floats: Floats, others: Others, h0: Array) -> tuple[Array, NewtonInfo]:
    if plan.axis is None:
        return _evaluate(plan, floats, others, h0, Line())
    over_time, everywhere = plan.places()
    outs = (over_time, jax.tree.map(lambda _: PartitionSpec(), NewtonInfo.exact()))
    run = functools.partial(_evaluate, plan, line=Line(plan.axis))
    return plan.on_devices(run, (*plan.specs(floats, others), everywhere), outs)(floats, others, h0)


def _forward(plan: Plan, floats: Floats, others: Others, h0: Array) -> Any:
    h, info = _run(plan, floats, others, h0)
    h = kept(h)
    return (h, info), (floats, others, h0, h)


def _backward(plan: Plan, residuals: Any, cotangents: Any) -> Any:
    floats, others, h0, h = residuals
    dh, _ = cotangents
    if plan.axis is None:
        dfloats, dh0 = pull_back(plan, floats, others, h0, h, dh, Line())
        return dfloats, None, dh0
    over_time, everywhere = plan.places()
    specs = plan.specs(floats, others)
    run = functools.partial(pull_back, plan, line=Line(plan.axis))
    dfloats, dh0 = plan.on_devices(
        run, (*specs, everywhere, over_time, over_time), (specs[0], everywhere)
    )(floats, others, h0, h, dh)
    return dfloats, None, dh0


_run.defvjp(_forward, _backward)


def _evaluate(
    plan: Plan, floats: Floats, others: Others, h0: Array, line: Line
) -> tuple[Array, NewtonInfo]:
    sequential = functools.partial(_sequential, plan, line=line)
    newton = functools.partial(_newton, plan, line=line)
    if plan.method == "pallas":
        return fused.newton(plan, floats, others, h0)
    if plan.method == "auto":
        time = jax.tree.leaves((floats[1], others[1]))[0].shape[1]
        return lax.platform_dependent(
            floats,
            others,
            h0,
            cpu=sequential,
            default=newton if time >= SHORTEST_FOR_NEWTON else sequential,
        )
    return (sequential if plan.method == "sequential" else newton)(floats, others, h0)


def _sequential(
    plan: Plan, floats: Floats, others: Others, h0: Array, *, line: Line
) -> tuple[Array, NewtonInfo]:
    params, x = plan.split.join(floats, others)
    h = step_by_step(lambda h, x: plan.step(params, h, x), x, h0, others[2], line)
    return h, NewtonInfo.exact(h.dtype)


def _newton(
    plan: Plan, floats: Floats, others: Others, h0: Array, *, line: Line
) -> tuple[Array, NewtonInfo]:
    params, x = plan.split.join(floats, others)
    *_, reset, guess = others
    structure = plan.structure
    batch, time = jax.tree.leaves(x)[0].shape[:2]
    if reset is None:
        reset = jnp.zeros((batch, time), jnp.bool_)

    def body(carry: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Any]:
        (start, usual), (x, cut, guess, padding) = carry, inputs
        padding = jnp.broadcast_to(padding, cut.shape)
        function = plan.function(params, x)
        if guess is None:
            at_all_times = structure.split(usual)[:, None]
            guess = function(jnp.broadcast_to(at_all_times, (*cut.shape, *at_all_times.shape[2:])))
        else:
            guess = structure.split(guess)
        outcome = iterate(
            function,
            plan.matrices(params, x),
            structure.split(start),
            guess,
            cut,
            padding,
            line,
            plan.rules,
        )
        h, settled = structure.joined(outcome.h), outcome.settled
        failed = ~outcome.all_settled
        if plan.rules.safeguard:

            def rescued(h: Array) -> Array:
                exact = step_by_step(lambda h, x: plan.step(params, h, x), x, start, cut, line)
                return jnp.where(settled.reshape(*cut.shape, *[1] * (h.ndim - 2)), h, exact)

            h = lax.cond(failed, rescued, lambda h: h, h)
        usual = jnp.mean(h, axis=1)
        usual = jnp.where(jnp.isfinite(usual), usual, jnp.zeros((), h.dtype))
        return (h[:, -1], usual), (h, outcome.iterations, outcome.residual, failed)

    cut_up, put_together = windowed(time, plan.window)
    inputs = (cut_up((x, reset, guess)), cut_up.padding())
    (x, reset, guess), padding = inputs
    _, (h, iterations, residual, failed) = lax.scan(
        body, (h0, jnp.zeros_like(h0)), (x, reset, guess, padding)
    )
    info = NewtonInfo(
        iterations=jnp.max(iterations),
        residual=jnp.max(residual),
        converged=~jnp.any(failed),
        fallbacks=jnp.sum(failed, dtype=jnp.int32) if plan.rules.safeguard else jnp.int32(0),
    )
    return put_together(h), info
