"""Every solver on a dense GRU whose gain takes it from forgetting to chaos."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.ops import cells
from jaxrec.ops.newton import newton_scan, stability

SOLVERS: dict[str, dict[str, Any]] = {
    "newton": {"method": "newton"},
    "quasi_newton": {"method": "quasi_newton"},
    "elk": {"method": "elk", "variance": 1.0},
    "quasi_elk": {"method": "quasi_elk", "variance": 100.0},
    "damped": {"method": "newton", "relaxation": 0.5},
    "clipped": {"method": "newton", "clip": 1.0},
    "windows of 15": {"method": "newton", "window": 15},
}
GAINS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


def solver_against_gain(name: str, time: int, seeds: int) -> list[dict[str, Any]]:
    """A dense GRU in float64, with and without safeguards, against its Lyapunov exponent."""
    size = 6
    with jax.enable_x64(True):

        @functools.partial(jax.jit, static_argnames="safeguard")
        def measure(params: Any, u: Any, h0: Any, safeguard: bool) -> Any:
            run = functools.partial(newton_scan, cells.gru, params, u, h0, jacobian="dense")
            options = {"max_iters": time, "tol": 1e-9, "window": time} | SOLVERS[name]
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
