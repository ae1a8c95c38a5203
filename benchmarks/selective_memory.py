"""Peak temporary memory of the selective scan's gradient, beside the form that keeps every state.

    python benchmarks/selective_memory.py

Nothing is run: the numbers are the compiler's, of the programs as they would run on this machine.
Writes results/selective_memory_cpu.json.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrec.cli import timing
from jaxrec.ops.time import linear_scan, selective_scan

BATCH, INNER, STATES = 1, 512, 16
LENGTHS = (512, 2048, 8192, 32768)


def naive(x, dt, a, b, c):
    """The same recurrence through `linear_scan` on states (b t e n)."""
    decay = jnp.exp(dt[..., None] * a[None, None])
    entering = (dt * x)[..., None] * b[:, :, None]
    h, _ = linear_scan(decay, entering)
    return jnp.einsum("bten,btn->bte", h, c)


def temp_mib(scan, time):
    """Temporary memory of the gradient to all inputs, outputs not counted."""
    shapes = [(BATCH, time, INNER)] * 2 + [(INNER, STATES)] + [(BATCH, time, STATES)] * 2
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(lambda *inputs: jnp.sum(scan(*inputs)), argnums=(0, 1, 2, 3, 4))
    return timing.compile_program(gradient, *inputs).temp_mib


def main():
    records = []
    for time in LENGTHS:
        records.append(
            {
                "time": time,
                "input_mib": BATCH * time * INNER * 4 / 2**20,
                "selective_scan_mib": temp_mib(lambda *z: selective_scan(*z)[0], time),
                "all_states_mib": temp_mib(naive, time),
            }
        )
        print(records[-1], flush=True)
    report = {
        "benchmark": "selective_memory",
        "machine": timing.machine() | {"load_average_after": timing.load_average()},
        "rounds": 0,
        "sizes": {"batch": BATCH, "inner": INNER, "states": STATES},
        "results": records,
    }
    target = Path(__file__).parent / "results" / "selective_memory_cpu.json"
    target.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
