"""`jaxrec bench matrix`: the matrix recurrence by chunks of every size, and step by step."""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrec.cli import bench, passes, timing
from jaxrec.errors import UserError
from jaxrec.ops.time import matrix_scan

HEADS, WIDTH = 4, 64  # of keys and of values
SMOKE_TIMES, SMOKE_CHUNKS, SMOKE_WIDTH = (20,), (8,), 4
CHECKED_TIME = 37
TOLERANCE = 1e-5
"""Largest gap between float32 and float64, relative to the largest value. Measured: up to 2e-6."""

Inputs = dict[str, Array]


def run(arguments: "bench.MatrixArguments") -> None:
    """Checks, compiles and times all candidates, and prints what came out.

    Raises:
      UserError: a length or a chunk is below 1, or there is no rule or decay.
      WrongNumbers: a candidate fails its check.
    """
    for name in ("times", "chunks"):
        values = getattr(arguments, name)
        if not values or min(values) < 1:
            raise UserError(f"--{name}: expected numbers >= 1, got {values}.")
    if not arguments.rules or not arguments.decays:
        raise UserError("--rules and --decays need at least one value.")
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {arguments.rounds}.")
    timing.check_out(arguments.out)
    times, chunks, width, rounds = arguments.times, arguments.chunks, WIDTH, arguments.rounds
    if arguments.smoke:
        times, chunks, width, rounds = SMOKE_TIMES, SMOKE_CHUNKS, SMOKE_WIDTH, 1
    kinds = list(itertools.product(arguments.rules, arguments.decays))
    for rule, decay in kinds:
        for name, scan in candidates(rule, chunks).items():
            check(rule, decay, name, scan)
    timing.say("checked against float64, step by step")
    report: dict[str, Any] = {
        "benchmark": "matrix",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "sizes": {"batch": 1, "heads": HEADS, "keys": width, "values": width},
        "results": [],
    }
    with timing.without_compilation_cache():
        for rule, decay in kinds:
            for time in times:
                inputs = draw(rule, decay, time, width)
                found = passes.measure(candidates(rule, chunks), inputs, rounds)
                report["results"] += [
                    {"rule": rule, "decay": decay, "time": time, "candidate": name} | took
                    for name, took in found.items()
                ]
                timing.say(f"{rule}, decay: {decay}, t = {time}: timed")
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def candidates(rule: str, chunks: tuple[int, ...]) -> dict[str, passes.Function]:
    """`matrix_scan` in chunks of each size, and the loop that defines it."""

    def scan(inputs: Inputs, **options: Any) -> Array:
        return matrix_scan(**inputs, rule=rule, **options)[0]  # type: ignore[arg-type]

    found: dict[str, passes.Function] = {"sequential": functools.partial(scan, method="sequential")}
    for chunk in chunks:
        found[f"chunks of {chunk}"] = functools.partial(scan, method="chunkwise", chunk=chunk)
    return found


def draw(
    rule: str, decay: "bench.Decay", time: int, width: int, dtype: Any = jnp.float32
) -> Inputs:
    """Inputs (1 t h ...); keys of length 1."""
    rng = np.random.default_rng(0)
    shape = (1, time, HEADS)
    q, k, v = rng.normal(size=(3, *shape, width))
    inputs = {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": v}
    if decay != "none":
        inputs["log_decay"] = -0.1 * np.abs(
            rng.normal(size=shape if decay == "head" else (*shape, width))
        )
    if rule == "delta":
        inputs["beta"] = rng.uniform(size=shape)
    return {name: jnp.asarray(x, dtype) for name, x in inputs.items()}


def check(rule: str, decay: "bench.Decay", name: str, scan: passes.Function) -> None:
    """Compares a candidate, outputs and all gradients, with the loop in float64.

    Raises:
      WrongNumbers: it differs by more than `TOLERANCE`; the message names it and what differs.
    """
    draw_small = functools.partial(draw, rule, decay, CHECKED_TIME, SMOKE_WIDTH)
    want = passes.exact(candidates(rule, ())["sequential"], draw_small)
    got = passes.computed(scan, draw_small())
    passes.refuse(f"{rule}, decay: {decay}, {name}", passes.gaps(got, want), TOLERANCE)
