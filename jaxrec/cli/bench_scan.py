"""`jaxrec bench scan`: the linear recurrence and its gradient, beside what else computes them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxrec.cli import bench, passes, timing
from jaxrec.errors import UserError
from jaxrec.ops.time import linear_scan
from jaxrec.ops.time.scan import Method

Scan = Callable[[Array, Array, Array], tuple[Array, Array]]
"""(a, b, h0) -> (h, last), as `linear_scan`."""

CHECKED_SHAPE = (2, 37, 3)
TOLERANCE = 1e-6
"""Largest error of a float32 candidate relative to the largest value. Measured: up to 1.1e-7."""
SMOKE_SHAPES = ("2,64,8",)
FLOATS_FORWARD, FLOATS_BOTH = 3, 8
"""Floats per element that any scan moves: a, b, h; with the gradient also a, h, dh, da, db."""


def run(arguments: "bench.ScanArguments") -> None:
    """Checks, compiles and times all candidates, and prints what came out.

    Raises:
      UserError: a shape or a method is not one.
      WrongNumbers: a candidate fails its check.
    """
    shapes = [_shape(text) for text in (SMOKE_SHAPES if arguments.smoke else arguments.shapes)]
    unknown = [name for name in arguments.methods if name not in get_args(Method)]
    if unknown:
        raise UserError(
            f"--methods: linear_scan has no method {unknown[0]!r}."
            f" It has {', '.join(get_args(Method))}."
        )
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {arguments.rounds}.")
    timing.check_out(arguments.out)
    candidates = peers() | ours(arguments.methods)
    for name, scan in candidates.items():
        check(name, scan)
    timing.say(f"checked against the float64 loop: {', '.join(candidates)}")
    rounds = 1 if arguments.smoke else arguments.rounds
    report: dict[str, Any] = {
        "benchmark": "scan",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "recurrentgemma": "timed" if "recurrentgemma" in candidates else "not installed",
        "results": [],
    }
    with timing.without_compilation_cache():
        for shape in shapes:
            report["results"] += measure(candidates, shape, rounds)
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def ours(methods: Sequence[str]) -> dict[str, Scan]:
    """`linear_scan` by each method."""
    return {f"jaxrec {m}": functools.partial(linear_scan, method=m) for m in methods}  # type: ignore[arg-type]


def peers() -> dict[str, Scan]:
    """What a user would write or install instead; recurrentgemma only where it is installed."""
    found: dict[str, Scan] = {"lax.scan": plain_scan, "lax.associative_scan": associative_scan}
    recurrentgemma = _recurrentgemma()
    return found if recurrentgemma is None else found | {"recurrentgemma": recurrentgemma}


def plain_scan(a: Array, b: Array, h0: Array) -> tuple[Array, Array]:
    """The loop as it is usually written, differentiated by JAX."""

    def step(h: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        h = inputs[0] * h + inputs[1]
        return h, h

    last, h = lax.scan(step, h0, (jnp.swapaxes(a, 0, 1), jnp.swapaxes(b, 0, 1)))
    return jnp.swapaxes(h, 0, 1), last


def associative_scan(a: Array, b: Array, h0: Array) -> tuple[Array, Array]:
    """`lax.associative_scan` over pairs (a, b), differentiated by JAX."""

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, h = lax.associative_scan(combine, (a, b.at[:, 0].add(a[:, 0] * h0)), axis=1)
    return h, h[:, -1]


def _recurrentgemma() -> Scan | None:
    try:
        import typeguard

        # It was written for an old typeguard, whose decorator the present one would misread.
        module: Any = typeguard
        decorator, module.typechecked = module.typechecked, lambda function: function
        try:
            from recurrentgemma.jax import scan
        finally:
            module.typechecked = decorator
    except ImportError:
        return None
    return lambda a, b, h0: scan.linear_scan(b, a, h0)


def check(name: str, scan: Scan) -> None:
    """Compares a candidate with the loop in float64, outputs and all gradients.

    Raises:
      WrongNumbers: it differs by more than `TOLERANCE`; the message names it and what differs.
    """
    rng = np.random.default_rng(0)
    batch, _, width = CHECKED_SHAPE
    a = rng.uniform(0.2, 1.0, CHECKED_SHAPE)
    b, dh = rng.normal(size=(2, *CHECKED_SHAPE))
    h0, dlast = rng.normal(size=(2, batch, width))
    right = _loop(a, b, h0, dh, dlast)
    got = jax.jit(_with_gradient(scan))(
        *(jnp.asarray(x, jnp.float32) for x in (a, b, h0, dh, dlast))
    )
    names = ("h", "last", "da", "db", "dh0")
    found = passes.gaps(dict(zip(names, got, strict=True)), dict(zip(names, right, strict=True)))
    passes.refuse(name, found, TOLERANCE)


def _loop(a: Any, b: Any, h0: Any, dh: Any, dlast: Any) -> tuple[np.ndarray, ...]:
    """h, last, da, db, dh0 by the definition, one step after the other."""
    h, da, db = np.empty_like(b), np.empty_like(a), np.empty_like(b)
    last = h0
    for t in range(b.shape[1]):
        last = h[:, t] = a[:, t] * last + b[:, t]
    adjoint = dlast
    for t in reversed(range(b.shape[1])):
        adjoint = db[:, t] = dh[:, t] + adjoint
        da[:, t] = adjoint * (h[:, t - 1] if t else h0)
        adjoint = a[:, t] * adjoint
    return h, last, da, db, adjoint


def _with_gradient(scan: Scan) -> Callable[..., tuple[Array, ...]]:
    def both(a: Array, b: Array, h0: Array, dh: Array, dlast: Array) -> tuple[Array, ...]:
        outputs, backward = jax.vjp(scan, a, b, h0)
        return *outputs, *backward((dh, dlast))

    return both


def measure(
    candidates: dict[str, Scan], shape: tuple[int, int, int], rounds: int
) -> list[dict[str, Any]]:
    """Times all candidates at one shape; one record each."""
    batch, _, width = shape
    keys = jax.random.split(jax.random.key(0), 5)
    a = jax.random.uniform(keys[0], shape)
    b, dh = jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape)
    h0, dlast = (jax.random.normal(key, (batch, width)) for key in keys[3:])
    forward, both = {}, {}
    for name, scan in candidates.items():
        forward[name] = timing.compile_program(scan, a, b, h0)
        both[name] = timing.compile_program(_with_gradient(scan), a, b, h0, dh, dlast)
        seconds = forward[name].compile_seconds + both[name].compile_seconds
        timing.say(f"{shape} {name}: compiled in {seconds:.1f} s")
    copy = timing.compile_program(lambda x: x + 1, a)
    calls = {"copy": functools.partial(copy.call, a)}
    for name in candidates:
        calls[f"{name}, forward"] = functools.partial(forward[name].call, a, b, h0)
        calls[f"{name}, both"] = functools.partial(both[name].call, a, b, h0, dh, dlast)
    times = timing.race(calls, rounds)

    megabytes = a.size * a.dtype.itemsize / 1e6
    copied = 2 * megabytes / 1e3 / times["copy"].least
    records = []
    for name in candidates:
        record: dict[str, Any] = {"shape": list(shape), "candidate": name}
        for pass_, program, floats in (
            ("forward", forward[name], FLOATS_FORWARD),
            ("both", both[name], FLOATS_BOTH),
        ):
            time = times[f"{name}, {pass_}"]
            others = [times[f"{peer}, {pass_}"] for peer in candidates if _is_peer(peer)]
            record[pass_] = {
                "median_ms": 1e3 * time.median,
                "least_ms": 1e3 * time.least,
                "compile_s": program.compile_seconds,
                "temp_mib": program.temp_mib,
                "peak_mib": program.peak_mib,
                "gb_per_s": floats * megabytes / 1e3 / time.least,
                "to_best_peer_median": time.median / min(other.median for other in others),
                "to_best_peer_least": time.least / min(other.least for other in others),
            }
        records.append(record | {"copy_gb_per_s": copied})
    return records


def _is_peer(name: str) -> bool:
    return not name.startswith("jaxrec")


def _shape(text: str) -> tuple[int, int, int]:
    try:
        batch, time, width = (int(part) for part in text.split(","))
    except ValueError:
        batch = time = width = 0
    if min(batch, time, width) < 1:
        raise UserError(f"--shapes: {text!r} is not a shape; expected b,t,d such as 8,4096,256.")
    return batch, time, width
