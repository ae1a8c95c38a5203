"""`jaxrec bench newton`: a nonlinear recurrence by every method, beside what one would write."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.cli import bench, passes, timing
from jaxrec.errors import UserError
from jaxrec.ops.cells import para_gru
from jaxrec.ops.newton import newton_scan

Cell = Callable[[Array, Array, Array], Array]
"""(recurrent, u, h0) -> h: a ParaGRU over all steps."""

LIMIT = 0.5
"""Recurrent entries are drawn up to this, within which Newton's method takes some four steps."""
NAIVE_ITERATIONS = 4
SMOKE_TIMES, SMOKE_WIDTHS = (20,), (4,)
CHECKED_SHAPE = (2, 37, 3)
TOLERANCE = 2e-5
"""Largest error of a float32 candidate relative to the largest value. Measured: up to 2e-6."""
FLOATS_FORWARD, FLOATS_BOTH = 4, 12
"""Floats per element of h that any method moves: u and h; with the gradient also u, h, dh, du."""


def run(arguments: "bench.NewtonArguments") -> None:
    """Checks, compiles and times all candidates, and prints what came out.

    Raises:
      UserError: a length, a width or another number is below 1.
      WrongNumbers: a candidate fails its check.
    """
    for name in ("times", "widths"):
        values = getattr(arguments, name)
        if not values or min(values) < 1:
            raise UserError(f"--{name}: expected numbers >= 1, got {values}.")
    for name in ("batch", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    timing.check_out(arguments.out)
    found = candidates()
    for name, cell in found.items():
        check(name, cell)
    timing.say(f"checked against the float64 loop: {', '.join(found)}")
    times, widths, rounds = arguments.times, arguments.widths, arguments.rounds
    if arguments.smoke:
        times, widths, rounds = SMOKE_TIMES, SMOKE_WIDTHS, 1
    report: dict[str, Any] = {
        "benchmark": "newton",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "batch": arguments.batch,
        "naive_iterations": NAIVE_ITERATIONS,
        "results": [],
    }
    with timing.without_compilation_cache():
        for width in widths:
            for time in times:
                report["results"] += measure(found, (arguments.batch, time, width), rounds)
                timing.say(f"t = {time}, d = {width}: timed")
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def candidates() -> dict[str, Cell]:
    """`newton_scan` by its methods, and what a user would write instead."""

    def ours(recurrent: Array, u: Array, h0: Array, *, method: Any) -> Array:
        h, _ = newton_scan(
            para_gru, recurrent, u, h0, jacobian="diagonal", method=method, check=False
        )
        return h

    return {
        "lax.scan": plain_scan,
        "naive Newton, one solve backward": naive_newton_one_solve,
        "naive Newton, differentiated through": naive_newton,
        **{
            f"jaxrec {method}": functools.partial(ours, method=method)
            for method in ("auto", "sequential", "newton")
        },
    }


def plain_scan(recurrent: Array, u: Array, h0: Array) -> Array:
    """The loop as it is usually written, differentiated by JAX."""

    def step(h: Array, u: Array) -> tuple[Array, Array]:
        h = para_gru(recurrent, h, u)
        return h, h

    return jnp.swapaxes(lax.scan(step, h0, jnp.swapaxes(u, 0, 1))[1], 0, 1)


def _at_all_steps(recurrent: Array, h: Array, u: Array) -> Array:
    return jax.vmap(para_gru, in_axes=(None, 1, 1), out_axes=1)(recurrent, h, u)


def _solve(a: Array, b: Array, *, reverse: bool = False) -> Array:
    """h_t = a_t h_{t-1} + b_t from zero, by `lax.associative_scan`."""

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return lax.associative_scan(combine, (a, b), axis=1, reverse=reverse)[1]


def naive_newton(recurrent: Array, u: Array, h0: Array) -> Array:
    """A fixed number of Newton's iterations, whose gradient JAX takes through all of them."""
    h = _at_all_steps(recurrent, jnp.zeros_like(u[:, :, 0]), u)
    for _ in range(NAIVE_ITERATIONS):
        before = jnp.concatenate([h0[:, None], h[:, :-1]], axis=1)
        value, slope = jax.jvp(
            lambda before: _at_all_steps(recurrent, before, u), (before,), (jnp.ones_like(h),)
        )
        h = h + _solve(slope, value - h)
    return h


@jax.custom_vjp
def naive_newton_one_solve(recurrent: Array, u: Array, h0: Array) -> Array:
    """The same, with a gradient of one solve at the solution."""
    return naive_newton(recurrent, u, h0)


def _forward(recurrent: Array, u: Array, h0: Array) -> tuple[Array, tuple[Array, ...]]:
    h = naive_newton(recurrent, u, h0)
    return h, (recurrent, u, h0, h)


def _backward(residuals: tuple[Array, ...], dh: Array) -> tuple[Array, ...]:
    recurrent, u, h0, h = residuals
    before = jnp.concatenate([h0[:, None], h[:, :-1]], axis=1)
    _, slope = jax.jvp(
        lambda before: _at_all_steps(recurrent, before, u), (before,), (jnp.ones_like(h),)
    )
    after = jnp.concatenate([slope[:, 1:], jnp.zeros_like(h0)[:, None]], axis=1)
    adjoint = _solve(after, dh, reverse=True)
    _, pull = jax.vjp(lambda recurrent, u: _at_all_steps(recurrent, before, u), recurrent, u)
    return *pull(adjoint), slope[:, 0] * adjoint[:, 0]


naive_newton_one_solve.defvjp(_forward, _backward)


def with_gradient(cell: Cell) -> Callable[..., tuple[Array, ...]]:
    """h, and the gradients to all arguments for a cotangent of h."""

    def both(recurrent: Array, u: Array, h0: Array, dh: Array) -> tuple[Array, ...]:
        h, backward = jax.vjp(cell, recurrent, u, h0)
        return h, *backward(dh)

    return both


def draw(shape: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    """recurrent, u, h0 and dh, float64."""
    batch, time, width = shape
    rng = np.random.default_rng(0)
    recurrent = rng.uniform(-LIMIT, LIMIT, (3, width))
    u, dh = rng.normal(size=(batch, time, 3, width)), rng.normal(size=shape)
    return recurrent, u, rng.normal(size=(batch, width)), dh


def check(name: str, cell: Cell) -> None:
    """Compares a candidate, outputs and all gradients, with the loop in float64.

    Raises:
      WrongNumbers: it differs by more than `TOLERANCE`; the message names it and what differs.
    """
    inputs = draw(CHECKED_SHAPE)
    with jax.enable_x64(True):
        want = jax.jit(with_gradient(plain_scan))(*map(jnp.asarray, inputs))
    got = jax.jit(with_gradient(cell))(*(jnp.asarray(z, jnp.float32) for z in inputs))
    names = ("h", "drecurrent", "du", "dh0")
    found = passes.gaps(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))
    passes.refuse(name, found, TOLERANCE)


def measure(
    cells: dict[str, Cell], shape: tuple[int, int, int], rounds: int
) -> list[dict[str, Any]]:
    """Times all candidates at one shape; one record each."""
    *forward_inputs, dh = (jnp.asarray(z, jnp.float32) for z in draw(shape))
    inputs = {"forward": tuple(forward_inputs), "both": (*forward_inputs, dh)}
    programs, calls = {}, {}
    for name, cell in cells.items():
        for part, function in (("forward", cell), ("both", with_gradient(cell))):
            program = programs[name, part] = timing.compile_program(function, *inputs[part])
            calls[f"{name}, {part}"] = functools.partial(program.call, *inputs[part])
    copy = timing.compile_program(lambda x: x + 1, dh)
    calls["copy"] = functools.partial(copy.call, dh)
    times = timing.race(calls, rounds)
    recurrent, u, h0 = forward_inputs
    _, info = newton_scan(
        para_gru, recurrent, u, h0, jacobian="diagonal", method="newton", check=False
    )
    gigabytes = dh.size * dh.dtype.itemsize / 1e9
    records = []
    for name in cells:
        record: dict[str, Any] = {
            "time": shape[1],
            "width": shape[2],
            "candidate": name,
            "iterations": int(info.iterations),
            "copy_gb_per_s": 2 * gigabytes / times["copy"].least,
        }
        for part, floats in (("forward", FLOATS_FORWARD), ("both", FLOATS_BOTH)):
            took, plain = times[f"{name}, {part}"], times[f"lax.scan, {part}"]
            program = programs[name, part]
            record[part] = {
                "median_ms": 1e3 * took.median,
                "least_ms": 1e3 * took.least,
                "compile_s": program.compile_seconds,
                "temp_mib": program.temp_mib,
                "gb_per_s": floats * gigabytes / took.least,
                "to_lax_scan_median": took.median / plain.median,
                "to_lax_scan_least": took.least / plain.least,
            }
        records.append(record)
    return records
