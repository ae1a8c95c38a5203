"""`jaxrec bench newton`: a nonlinear recurrence by every method, beside what one would write.

Speed-ups of parallel over sequential RNNs are often told against a loop in Python that sends each
operation to the device by itself; "eager Python loop" is that one, and `lax.scan` the compiled one.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.cli import bench, passes, timing
from jaxrec.errors import UserError
from jaxrec.ops.cells import ParaLSTMParams, para_gru, para_lstm
from jaxrec.ops.newton import newton_scan
from jaxrec.ops.newton.structure import Kind

Cell = Callable[[Any, Array, Array], Array]
"""(params, u, h0) -> h: a ParaGRU or ParaLSTM over all steps."""


class Case(NamedTuple):
    """One kind of cell."""

    step: Callable[[Any, Array, Array], Array]
    jacobian: Kind
    names: tuple[str, ...]  # of the gradients
    # Floats per channel and step that any method moves: u and h; with the gradient also u, h and dh
    # once more, and du.
    forward: int
    both: int


CASES = {
    "gru": Case(para_gru, "diagonal", ("drecurrent", "du", "dh0"), 4, 12),
    "lstm": Case(para_lstm, "block", ("drecurrent", "dpeephole", "du", "dh0"), 5, 15),
}
EAGER = "eager Python loop"

LIMIT = 0.5
"""Recurrent entries are drawn up to this, within which Newton's method takes some four steps."""
NAIVE_ITERATIONS = 4
SMOKE_TIMES, SMOKE_WIDTHS = (20,), (4,)
CHECKED_SHAPE = (2, 37, 3)
TOLERANCE = 2e-5
"""Largest error of a float32 candidate relative to the largest value. Measured: up to 2e-6."""


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
    for name in ("batch", "rounds", "window"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    timing.check_out(arguments.out)
    found = {
        cell: candidates(
            cell,
            window=arguments.window,
            eager=arguments.eager,
            kernel=jax.default_backend() in ("gpu", "tpu"),  # on a CPU it is interpreted
        )
        for cell in arguments.cells
    }
    for cell, those in found.items():
        for name, run_cell in those.items():
            check(name, run_cell, cell)
        timing.say(f"{cell}: checked against the float64 loop: {', '.join(those)}")
    times, widths, rounds = arguments.times, arguments.widths, arguments.rounds
    if arguments.smoke:
        times, widths, rounds = SMOKE_TIMES, SMOKE_WIDTHS, 1
    report: dict[str, Any] = {
        "benchmark": "newton",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "batch": arguments.batch,
        "window": arguments.window,
        "naive_iterations": NAIVE_ITERATIONS,
        "results": [],
    }
    with timing.without_compilation_cache():
        for cell, width, time in itertools.product(found, widths, times):
            report["results"] += measure(found[cell], (arguments.batch, time, width), rounds, cell)
            timing.say(f"{cell}, t = {time}, d = {width}: timed")
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def candidates(
    cell: str = "gru", *, window: int = 1024, eager: bool = False, kernel: bool = False
) -> dict[str, Cell]:
    """`newton_scan` by its methods, its kernel too if asked for, and what a user would write
    instead.
    """
    case = CASES[cell]

    def ours(params: Any, u: Array, h0: Array, **options: Any) -> Array:
        h, _ = newton_scan(
            case.step,
            params,
            u,
            h0,
            jacobian=case.jacobian,
            check=False,
            **options,
        )
        return h

    found: dict[str, Cell] = {"lax.scan": functools.partial(plain_scan, case.step)}
    if eager:
        found[EAGER] = functools.partial(eager_loop, case.step)
    if cell == "gru":
        found["naive Newton, one solve backward"] = naive_newton_one_solve
        found["naive Newton, differentiated through"] = naive_newton
    for method, steps in itertools.product(("auto", "sequential", "newton"), (None, window)):
        name = f"jaxrec {method}" + (f", windows of {steps}" if steps else "")
        found[name] = functools.partial(ours, method=method, window=steps)
    if kernel:
        found["jaxrec pallas"] = functools.partial(ours, method="pallas")
        found["jaxrec pallas, one chunk"] = functools.partial(ours, method="pallas", chunks=1)
    return found


def plain_scan(step: Any, params: Any, u: Array, h0: Array) -> Array:
    """The loop as it is usually written, differentiated by JAX."""

    def body(h: Array, u: Array) -> tuple[Array, Array]:
        h = step(params, h, u)
        return h, h

    return jnp.swapaxes(lax.scan(body, h0, jnp.swapaxes(u, 0, 1))[1], 0, 1)


def eager_loop(step: Any, params: Any, u: Array, h0: Array) -> Array:
    """The loop in Python; not compiled, it sends every operation to the device by itself."""
    h = [h0]
    for t in range(u.shape[1]):
        h.append(step(params, h[-1], u[:, t]))
    return jnp.stack(h[1:], axis=1)


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

    def both(params: Any, u: Array, h0: Array, dh: Array) -> tuple[Array, ...]:
        h, backward = jax.vjp(cell, params, u, h0)
        return h, *jax.tree.leaves(backward(dh))

    return both


def draw(shape: tuple[int, int, int], cell: str, dtype: Any) -> tuple[Any, Array, Array, Array]:
    """Parameters, u, h0 and dh."""
    batch, time, width = shape
    rng = np.random.default_rng(0)
    entries = [jnp.asarray(rng.uniform(-LIMIT, LIMIT, (n, width)), dtype) for n in (3, 2)]
    state = (2, width) if cell == "lstm" else (width,)
    u, h0, dh = (
        jnp.asarray(rng.normal(size=size), dtype)
        for size in ((batch, time, 3, width), (batch, *state), (batch, time, *state))
    )
    return ParaLSTMParams(*entries) if cell == "lstm" else entries[0], u, h0, dh


def check(name: str, run_cell: Cell, cell: str) -> None:
    """Compares a candidate, outputs and all gradients, with the loop in float64.

    Raises:
      WrongNumbers: it differs by more than `TOLERANCE`; the message names it and what differs.
    """
    case = CASES[cell]
    with jax.enable_x64(True):
        loop = with_gradient(functools.partial(plain_scan, case.step))
        want = jax.jit(loop)(*draw(CHECKED_SHAPE, cell, jnp.float64))
    got = jax.jit(with_gradient(run_cell))(*draw(CHECKED_SHAPE, cell, jnp.float32))
    names = ("h", *case.names)
    found = passes.gaps(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))
    passes.refuse(name, found, TOLERANCE)


def measure(
    cells: dict[str, Cell], shape: tuple[int, int, int], rounds: int, cell: str
) -> list[dict[str, Any]]:
    """Times all candidates at one shape; one record each."""
    case, inputs = CASES[cell], draw(shape, cell, jnp.float32)
    programs, calls = {}, {}
    for name, run_cell in cells.items():
        for part, function in (("forward", run_cell), ("both", with_gradient(run_cell))):
            arguments = inputs if part == "both" else inputs[:-1]
            if name == EAGER:
                calls[f"{name}, {part}"] = functools.partial(function, *arguments)
                continue
            program = programs[name, part] = timing.compile_program(function, *arguments)
            calls[f"{name}, {part}"] = functools.partial(program.call, *arguments)
    copy = timing.compile_program(lambda x: x + 1, inputs[-1])
    calls["copy"] = functools.partial(copy.call, inputs[-1])
    times = timing.race(calls, rounds)
    params, u, h0, dh = inputs
    _, info = newton_scan(
        case.step, params, u, h0, jacobian=case.jacobian, method="newton", check=False
    )
    copied = 2 * dh.size * dh.dtype.itemsize / 1e9 / times["copy"].least
    gigabytes = 4 * math.prod(shape) / 1e9
    records = []
    for name in cells:
        record: dict[str, Any] = {
            "cell": cell,
            "time": shape[1],
            "width": shape[2],
            "candidate": name,
            "iterations": int(info.iterations),
            "copy_gb_per_s": copied,
        }
        for part, floats in (("forward", case.forward), ("both", case.both)):
            took, plain = times[f"{name}, {part}"], times[f"lax.scan, {part}"]
            compiled = programs.get((name, part))
            floor = floats * gigabytes / copied
            record[part] = {
                "median_ms": 1e3 * took.median,
                "least_ms": 1e3 * took.least,
                "compile_s": 0.0 if compiled is None else compiled.compile_seconds,
                "temp_mib": None if compiled is None else compiled.temp_mib,
                "gb_per_s": floats * gigabytes / took.least,
                "floor_ms": 1e3 * floor,
                "to_floor": took.least / floor,
                "to_lax_scan_median": took.median / plain.median,
                "to_lax_scan_least": took.least / plain.least,
            }
        records.append(record)
    return records
