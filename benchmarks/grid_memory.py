"""Memory of the recurrence on a grid and of the classifier of images, beside the published scheme.

    python benchmarks/grid_memory.py

The published scheme is peers/grid_published.py, which must first give the same outputs and
gradients. Nothing else is run: the numbers are the compiler's, of the programs as they would run on
this machine. Writes results/grid_memory_cpu.json.
"""

import functools
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.cli import passes, timing
from jaxrec.cli.bench_grid import BATCH, HEADS, LAYERS, PATCH, TRAINED_GRID, TRANSITION, WIDTH
from jaxrec.layers import plstm
from jaxrec.models.plstm_vision import vision_config
from jaxrec.ops.time import GridGates, grid_scan

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import grid_published

ORIENTATIONS = (0, 1, 2, 3)
SIDES, IMAGES = (12, 24), (48, 96)
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value."""


def draw(side, batch, heads, width):
    """Inputs of a scan in all orientations, one state tracked."""
    rng = np.random.default_rng(0)
    lead = (batch, side, side, heads)
    q, k, v = rng.normal(size=(3, *lead, width))
    shape = (batch, side, side, len(ORIENTATIONS), heads)
    gates = rng.uniform(-1, 1, size=(len(GridGates._fields), *shape))
    gates[2:6] *= TRANSITION
    x = {"q": q, "k": k, "v": v, "gates": GridGates(*gates), "direct": rng.normal(size=lead)}
    return jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), x)


def of(scan):
    return lambda inputs: scan(**inputs, orientation=ORIENTATIONS)


def check():
    """Refuses a peer that computes something else."""
    inputs = draw(5, 2, 1, 3)
    want = passes.computed(of(functools.partial(grid_scan, method="sequential")), inputs)
    got = passes.computed(of(grid_published.grid_scan), inputs)
    passes.refuse("the published scheme", passes.gaps(got, want), TOLERANCE)
    logits, params = classifier(4 * PATCH)
    want = jax.jit(lambda params: {"logits": logits(params)})(params)
    with published():
        got = jax.jit(lambda params: {"logits": logits(params)})(params)
    passes.refuse("the classifier by the published scheme", passes.gaps(got, want), TOLERANCE)


def published():
    """Inside, layers run the published scheme."""
    return mock.patch.object(plstm, "grid_scan", grid_published.grid_scan)


def classifier(side):
    """Logits of the classifier as `jaxrec bench grid` has it, and its parameters."""
    config = vision_config(
        width=WIDTH, heads=HEADS, layers=LAYERS, patch=PATCH, grid=TRAINED_GRID, classes=2
    )
    model = jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(0))
    graph, state = nnx.split(model)
    images = jax.random.normal(jax.random.key(1), (BATCH, side, side, config.inputs))
    return lambda params: nnx.merge(graph, params)(images), nnx.to_pure_dict(state)


def memory(function, inputs):
    """Temporary memory and the peak, forward and with the gradient."""
    found = {}

    # A function of its own: what JAX traced of the same one before is kept, whatever runs inside.
    def own(inputs):
        return function(inputs)

    for part, program in (("forward", own), ("both", passes.with_gradient(own))):
        made = timing.compile_program(program, inputs)
        found[part] = {"temp_mib": made.temp_mib, "peak_mib": made.peak_mib}
    return found


def main():
    check()
    records = []
    for side in SIDES:
        inputs = draw(side, BATCH, HEADS, WIDTH // HEADS)
        record = {"part": "scan", "side": side, "jaxrec": memory(of(grid_scan), inputs)}
        record["published"] = memory(of(grid_published.grid_scan), inputs)
        records.append(record)
        print(record, flush=True)
    for side in IMAGES:
        logits, params = classifier(side)
        record = {"part": "model", "side": side, "jaxrec": memory(logits, params)}
        with published():
            record["published"] = memory(logits, params)
        records.append(record)
        print(record, flush=True)
    report = {
        "benchmark": "grid_memory",
        "machine": timing.machine() | {"load_average_after": timing.load_average()},
        "rounds": 0,
        "sizes": {"batch": BATCH, "heads": HEADS, "width": WIDTH, "layers": LAYERS, "patch": PATCH},
        "results": records,
    }
    target = Path(__file__).parent / "results" / "grid_memory_cpu.json"
    target.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
