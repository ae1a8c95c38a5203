"""When Newton's method solves a recurrence in few iterations, when it does not, and what helps.

Errors by iteration of ParaGRU and ParaLSTM at several gate scales; iterations against length, gate
scale and dtype; and every solver on a dense GRU whose gain takes it from forgetting to chaos.
Writes results.json and convergence.png; with --smoke, short sequences and nothing is written.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.ops import cells
from jaxrec.ops.newton import newton_scan, stability
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
SOLVERS: dict[str, dict[str, Any]] = {
    "newton": {"method": "newton"},
    "quasi_newton": {"method": "quasi_newton"},
    "elk": {"method": "elk", "variance": 1.0},
    "damped": {"method": "newton", "relaxation": 0.5},
    "clipped": {"method": "newton", "clip": 1.0},
}
GAINS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="short sequences, nothing written")
    options = parser.parse_args()
    results = run(options.smoke)
    text = json.dumps(results, indent=1)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results, HERE / "convergence.png")


def run(smoke: bool) -> dict[str, Any]:
    """All three parts."""
    errors, lengths = [], []
    for cell, times in (("gru", (256, 2048)), ("lstm", (256,))):
        for time in (16,) if smoke else times:
            errors += errors_by_iteration(cell, time, (0, 3) if smoke else ITERATIONS)
            say(f"{cell}, t = {time}: errors by iteration")
    for dtype in ("float32", "float64"):
        for time in (16,) if smoke else (64, 256, 1024, 4096):
            lengths += iterations_at_length(time, dtype)
            say(f"t = {time}, {dtype}: iterations")
    solvers = []
    for name in SOLVERS:
        solvers += solver_against_gain(name, 12 if smoke else 90, 1 if smoke else 3)
        say(f"{name}: against the gain")
    return {"errors": errors, "lengths": lengths, "solvers": solvers, "versions": versions()}


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
        errors = [float(jnp.max(jnp.abs(iterate(*inputs, k=k) - h))) for k in iterations]
        records.append(
            {"cell": cell, "scale": scale, "time": time}
            | {"errors": {str(k): str(e) for k, e in zip(iterations, errors, strict=True)}}
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


def solver_against_gain(name: str, time: int, seeds: int) -> list[dict[str, Any]]:
    """A dense GRU in float64, with and without safeguards, against its Lyapunov exponent."""
    size = 6
    with jax.enable_x64(True):

        @functools.partial(jax.jit, static_argnames="safeguard")
        def measure(params: Any, u: Any, h0: Any, safeguard: bool) -> Any:
            run = functools.partial(newton_scan, cells.gru, params, u, h0, jacobian="dense")
            options = SOLVERS[name] | {"max_iters": time, "tol": 1e-9, "window": time}
            h, info = run(check=False, safeguard=safeguard, **options)
            exact, _ = run(check=False, method="sequential")
            found = stability(cells.gru, params, u, h0, exact, jacobian="dense")
            return info, jnp.max(jnp.abs(h - exact)), found.exponent

        records = []
        for gain in GAINS:
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                recurrent = gain / size**0.5 * rng.normal(size=(size, 3, size))
                params = cells.GRUParams(jnp.asarray(recurrent), jnp.zeros(size))
                u = jnp.asarray(rng.normal(size=(1, time, 3, size)))
                h0 = jnp.zeros((1, size))
                info, error, exponent = measure(params, u, h0, safeguard=False)
                guarded, safe_error, _ = measure(params, u, h0, safeguard=True)
                records.append(
                    {"solver": name, "gain": gain, "seed": seed, "time": time}
                    | {"lyapunov": float(exponent), "iterations": int(info.iterations)}
                    | {"settled": bool(info.converged), "error": str(float(error))}
                    | {"guarded_error": float(safe_error), "fell_back": int(guarded.fallbacks)}
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


def plot(results: dict[str, Any], target: Path) -> None:
    """Errors by iteration, iterations by length, and by the Lyapunov exponent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for record in results["errors"]:
        if (record["cell"], record["time"]) == ("gru", 2048):
            errors = {int(k): float(e) for k, e in record["errors"].items()}
            left.semilogy(list(errors), list(errors.values()), marker="o", label=record["scale"])
    left.set(
        xlabel="iteration", ylabel="largest error", ylim=(1e-8, 1e3), title="ParaGRU, t = 2048"
    )
    for scale in SCALES:
        points = [x for x in results["lengths"] if (x["scale"], x["dtype"]) == (scale, "float32")]
        middle.semilogx(
            [x["time"] for x in points], [x["iterations"] for x in points], marker="o", label=scale
        )
    middle.set(xlabel="t", ylabel="iterations, at most 16", title="windows of 1024 steps, float32")
    for name in SOLVERS:
        points = [x for x in results["solvers"] if x["solver"] == name]
        exponents = [x["lyapunov"] for x in points]
        right.plot(exponents, [x["iterations"] for x in points], "o", markersize=4, label=name)
    right.axvline(0, color="0.7")
    right.set(xlabel="Lyapunov exponent", ylabel="iterations", title="dense GRU, t = 90")
    for panel in (left, middle, right):
        panel.legend(frameon=False, fontsize="small")
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    main()
