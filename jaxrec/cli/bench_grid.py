"""`jaxrec bench grid`: the recurrence on a grid by every method, and a classifier of images."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.cli import bench, passes, timing
from jaxrec.errors import UserError
from jaxrec.models.plstm_vision import vision_config
from jaxrec.ops.time import GridGates, grid_scan

BATCH, HEADS, WIDTH = 8, 3, 96
LAYERS, PATCH, TRAINED_GRID = 2, 4, (12, 12)
SMOKE_SIDES, SMOKE_IMAGES = (3,), (8,)
CHECKED_SIDES, CHECKED_SIZES = (5, 7), {"batch": 2, "heads": 1, "width": 3}
TOLERANCE = 1e-5
"""Largest gap between float32 and float64, relative to the largest value. Measured: up to 4e-7."""
TRANSITION = 0.3
"""Largest transition that is drawn; a state is passed on to two nodes."""
FIGURES = {(48, "both"): (1.23, 45.0), (96, "forward"): (7.0, 72.0)}
"""Seconds of a call, and to compile, of the authors' JAX code, by side of the image and pass."""

Inputs = dict[str, Any]
FORMS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "rows": {"method": "rows"},
    "parallel": {"method": "parallel"},
    "tiles of 8": {"tile": 8},
    "auto": {"method": "auto"},
}


def run(arguments: "bench.GridArguments") -> None:
    """Checks, compiles and times the recurrence and the model, and prints what came out.

    Raises:
      UserError: a side or the number of rounds is below 1, or patches do not divide an image.
      WrongNumbers: a method fails its check.
    """
    for name in ("sides", "images"):
        values = getattr(arguments, name)
        if not values or min(values) < 1:
            raise UserError(f"--{name}: expected numbers >= 1, got {values}.")
    uneven = [side for side in arguments.images if side % PATCH]
    if uneven:
        raise UserError(f"--images: sides must be multiples of {PATCH}, got {uneven[0]}.")
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {arguments.rounds}.")
    timing.check_out(arguments.out)
    for name in candidates():
        check(name)
    timing.say(f"checked against float64, node by node: {', '.join(candidates())}")
    sides, images, rounds = arguments.sides, arguments.images, arguments.rounds
    sizes = {"batch": BATCH, "heads": HEADS, "width": WIDTH, "layers": LAYERS, "patch": PATCH}
    if arguments.smoke:
        sides, images, rounds = SMOKE_SIDES, SMOKE_IMAGES, 1
        sizes |= {"batch": 2, "heads": 1, "width": 4, "layers": 1}
    report: dict[str, Any] = {
        "benchmark": "grid",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "sizes": sizes,
        "results": [],
    }
    with timing.without_compilation_cache():
        for side in sides:
            found = passes.measure(candidates(), draw((side, side), sizes), rounds)
            report["results"] += [
                {"part": "scan", "side": side, "candidate": name} | took
                for name, took in found.items()
            ]
            timing.say(f"a grid of {side} x {side}: timed")
        for side in images:
            report["results"].append(measure_model(side, sizes, rounds))
            timing.say(f"images of {side} x {side}: timed")
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def candidates() -> dict[str, passes.Function]:
    """`grid_scan` by each of its methods."""

    def scan(inputs: Inputs, **options: Any) -> Array:
        return grid_scan(**inputs, **options)

    return {name: functools.partial(scan, **options) for name, options in FORMS.items()}


def draw(shape: tuple[int, int], sizes: dict[str, int], dtype: Any = jnp.float32) -> Inputs:
    """Inputs (b x y h ...) that track one state, in one orientation."""
    rng = np.random.default_rng(0)
    lead = (sizes["batch"], *shape, sizes["heads"])
    q, k, v = rng.normal(size=(3, *lead, sizes["width"] // sizes["heads"]))
    gates = rng.uniform(-1, 1, size=(len(GridGates._fields), *lead))
    gates[2:6] *= TRANSITION
    inputs = {"q": q, "k": k, "v": v, "gates": GridGates(*gates), "direct": rng.normal(size=lead)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), inputs)


def check(name: str) -> None:
    """Compares a method, outputs and all gradients, with the loop over nodes in float64.

    Raises:
      WrongNumbers: it differs by more than `TOLERANCE`; the message names it and what differs.
    """
    scans = candidates()
    draw_small = functools.partial(draw, CHECKED_SIDES, CHECKED_SIZES)
    want = passes.exact(scans["sequential"], draw_small)
    got = passes.computed(scans[name], draw_small())
    passes.refuse(name, passes.gaps(got, want), TOLERANCE)


def measure_model(side: int, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Times the classifier at one size of images."""
    config = vision_config(
        width=sizes["width"],
        heads=sizes["heads"],
        layers=sizes["layers"],
        patch=PATCH,
        grid=TRAINED_GRID,
        classes=2,
    )
    model = jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    images = jax.random.normal(jax.random.key(1), (sizes["batch"], side, side, config.inputs))

    def logits(params: Any) -> Array:
        return nnx.merge(graph, params)(images)

    record: dict[str, Any] = {"part": "model", "side": side}
    record |= passes.measure({"model": logits}, params, rounds)["model"]
    for (of, what), (seconds, compile_seconds) in FIGURES.items():
        if of == side:
            record[what]["figure_s"] = seconds
            record[what]["figure_compile_s"] = compile_seconds
    return record
