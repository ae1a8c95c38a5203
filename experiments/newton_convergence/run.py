"""When Newton's method solves a recurrence in few iterations, when it does not, and what helps.

Errors by iteration of ParaGRU and ParaLSTM at several gate scales; iterations against length, gate
scale and dtype, and by where a window begins; and every solver on a dense GRU whose gain takes it
from forgetting to chaos.
Writes results.json and convergence.png; with --smoke, short sequences and nothing is written.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from time import process_time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from figures import plot
from gains import SOLVERS, solver_against_gain

from jaxrec.ops import cells
from jaxrec.ops.newton import newton_scan
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
BATCH, WIDTH = 2, 64
ITERATIONS = (0, 1, 2, 3, 4, 5, 8, 10)
SCALES: dict[str, tuple[float, float]] = {
    "default, 0.11": (2 / (5 * WIDTH) ** 0.5, np.inf),
    "N(0, 0.5^2)": (0.5, np.inf),
    "N(0, 1) cut to 0.5": (1.0, 0.5),
    "N(0, 1)": (1.0, np.inf),
    "N(0, 2^2)": (2.0, np.inf),
}
"""Deviation of the recurrent entries, and where they are cut."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--smoke", action="store_true", help="short sequences, nothing written")
    options = parser.parse_args()
    file = HERE / "results.json"
    # A part that is not run again stays as the file has it.
    results = json.loads(file.read_text()) if file.exists() and not options.smoke else {}
    for part in options.parts:
        begin = process_time()
        results[part] = PARTS[part](options.smoke)
        minutes = results.setdefault("cpu_minutes", {})
        minutes[part] = round((process_time() - begin) / 60, 1)
        results.setdefault("versions", {})[part] = versions()
        if not options.smoke:
            file.write_text(json.dumps(results, indent=1) + "\n")
    if options.smoke:
        print(json.dumps(results, indent=1))
    else:
        plot(results, [*SCALES], [*SOLVERS], HERE / "convergence.png")


def errors(smoke: bool) -> list[dict[str, Any]]:
    found = []
    for cell, times in (("gru", (256, 2048)), ("lstm", (256,))):
        for time in (16,) if smoke else times:
            found += errors_by_iteration(cell, time, (0, 3) if smoke else ITERATIONS)
            say(f"{cell}, t = {time}: errors by iteration")
    return found


def lengths(smoke: bool) -> list[dict[str, Any]]:
    found = []
    for dtype in ("float32", "float64"):
        for time in (16,) if smoke else (64, 256, 1024, 4096):
            found += iterations_at_length(time, dtype)
            say(f"t = {time}, {dtype}: iterations")
    return found


def solvers(smoke: bool) -> list[dict[str, Any]]:
    found = []
    for name in SOLVERS:
        found += solver_against_gain(name, 12 if smoke else 90, 1 if smoke else 3)
        say(f"{name}: against the gain")
    return found


def starts(smoke: bool) -> list[dict[str, Any]]:
    return iterations_by_start(*(8, 3) if smoke else (256, 9))


PARTS = {"errors": errors, "lengths": lengths, "solvers": solvers, "starts": starts}


def errors_by_iteration(cell: str, time: int, iterations: tuple[int, ...]) -> list[dict[str, Any]]:
    """max |h^k - h| without safeguards, one record for each gate scale."""

    @functools.partial(jax.jit, static_argnames="k")
    def iterate(params: Any, u: Any, h0: Any, k: int) -> Any:
        options = {"method": "newton", "max_iters": k, "window": time, "safeguard": False}
        return solve(cell, params, u, h0, tol=2e-7, **options)[0]

    exact = jax.jit(lambda *args: solve(cell, *args, method="sequential")[0])
    records = []
    for scale in SCALES:
        inputs = draw(cell, scale, time)
        h = exact(*inputs)
        gaps = [float(jnp.max(jnp.abs(iterate(*inputs, k=k) - h))) for k in iterations]
        records.append(
            {"cell": cell, "scale": scale, "time": time}
            | {"errors": {str(k): str(e) for k, e in zip(iterations, gaps, strict=True)}}
        )
    return records


def iterations_at_length(time: int, dtype: str) -> list[dict[str, Any]]:
    """What a ParaGRU takes as users run it: in windows, and safeguarded."""
    with jax.enable_x64(dtype == "float64"):

        @jax.jit
        def measure(params: Any, u: Any, h0: Any) -> Any:
            h, info = solve("gru", params, u, h0, method="newton")
            exact, _ = solve("gru", params, u, h0, method="sequential")
            return info, jnp.max(jnp.abs(h - exact))

        records = []
        for scale in SCALES:
            info, error = measure(*draw("gru", scale, time, dtype))
            records.append(
                {"time": time, "dtype": dtype, "scale": scale, "iterations": int(info.iterations)}
                | {"fallbacks": int(info.fallbacks), "windows": -(-time // 1024)}
                | {"error": float(error)}
            )
    return records


def iterations_by_start(window: int, count: int) -> list[dict[str, Any]]:
    """Mean over windows behind the first, each begun from f(h, x) at all its steps, where h is
    zero, the state that was carried in, or the mean state of the window before."""

    @jax.jit
    def measure(params: Any, u: Any, h0: Any) -> Any:
        h, _ = solve("gru", params, u, h0, method="sequential")
        found = []
        for end in range(window, count * window, window):
            inputs, start = u[:, end : end + window], h[:, end - 1]
            states = (0 * start, start, jnp.mean(h[:, end - window : end], axis=1))
            for state in states:
                guess = jax.vmap(cells.para_gru, (None, None, 1), 1)(params, state, inputs)
                _, info = solve("gru", params, inputs, start, method="newton", guess=guess)
                found.append(info.iterations)
        return jnp.mean(jnp.stack(found).reshape(-1, 3).astype(jnp.float32), axis=0)

    records = []
    for scale in SCALES:
        for update in (0.0, -3.0):  # added to the update gate: -3 forgets slowly
            params, u, h0 = draw("gru", scale, count * window)
            u[:, :, 0] += update
            means = dict(zip(("zero", "carried", "mean"), measure(params, u, h0), strict=True))
            records.append(
                {"scale": scale, "update": update, "window": window}
                | {name: round(float(value), 2) for name, value in means.items()}
            )
    return records


def solve(cell: str, params: Any, u: Any, h0: Any, **options: Any) -> Any:
    step: Any = cells.para_gru if cell == "gru" else cells.para_lstm
    kind: Any = "diagonal" if cell == "gru" else "block"
    return newton_scan(step, params, u, h0, jacobian=kind, check=False, **options)


def draw(cell: str, scale: str, time: int, dtype: str = "float32") -> tuple[Any, Any, Any]:
    """Parameters, u of unit-normal inputs through a Xavier map with spread biases, and h0."""
    rng = np.random.default_rng(0)
    deviation, limit = SCALES[scale]
    recurrent, peephole = (
        np.clip(deviation * rng.normal(size=(rows, WIDTH)), -limit, limit).astype(dtype)
        for rows in (3, 2)
    )
    kernel = rng.uniform(-1, 1, (WIDTH, 3, WIDTH)) * (3 / WIDTH) ** 0.5
    u = np.tensordot(rng.normal(size=(BATCH, time, WIDTH)), kernel, axes=1)
    u[:, :, 0] -= np.linspace(0, 1, WIDTH)
    params: Any = recurrent if cell == "gru" else cells.ParaLSTMParams(recurrent, peephole)
    shape = (BATCH, WIDTH) if cell == "gru" else (BATCH, 2, WIDTH)
    return params, u.astype(dtype), np.zeros(shape, dtype)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
