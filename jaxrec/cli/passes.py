"""Functions of one argument, forward and with their gradient: compared with float64, and timed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.cli import timing
from jaxrec.cli.timing import WrongNumbers

Function = Callable[[Any], Any]
"""From a pytree of arrays to arrays."""


def with_gradient(function: Function) -> Callable[[Any], tuple[Any, Any]]:
    """y, and the gradient of half its square, which needs every part of y."""

    def both(inputs: Any) -> tuple[Any, Any]:
        y, backward = jax.vjp(function, inputs)
        return y, backward(y)[0]

    return both


def computed(function: Function, inputs: Any) -> dict[str, np.ndarray]:
    """Outputs and gradients of a function by what they are called: y, or y and its parts, and "the
    gradient of" each input.
    """
    y, gradients = jax.device_get(jax.jit(with_gradient(function))(inputs))
    return _named("y", y) | _named("the gradient of", gradients)


def exact(definition: Function, draw: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """The same in float64, which not every device has: on the CPU. `draw` gives the inputs in a
    dtype.
    """
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return computed(definition, draw(jnp.float64))


def _named(what: str, tree: Any) -> dict[str, np.ndarray]:
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        found[f"{what} {jax.tree_util.keystr(path, simple=True, separator='.')}".rstrip()] = x
    return found


def gaps(got: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, float]:
    """The largest error of each array, relative to the largest value that it should hold; as it is
    where all should be zero.
    """
    found = {}
    for name, wanted in want.items():
        value, right = np.asarray(got[name]), np.asarray(wanted)
        found[name] = float(np.max(np.abs(value - right)) / (np.max(np.abs(right)) or 1.0))
    return found


def refuse(name: str, found: Mapping[str, float], tolerance: float) -> None:
    """Refuses a candidate, called `name`, some of whose gaps are above the tolerance.

    Raises:
      WrongNumbers: one is, or is not a number.
    """
    for what, gap in found.items():
        if not gap <= tolerance:
            raise WrongNumbers(
                f"{name} is wrong: {what} differs from the float64 loop by {gap:.1e} of its"
                f" largest value, allowed are {tolerance:.0e}."
            )


def measure(candidates: Mapping[str, Function], inputs: Any, rounds: int) -> dict[str, Any]:
    """Times all candidates in turns; for each what `forward` and `both` took."""
    programs, calls = {}, {}
    for name, function in candidates.items():
        for part, program in (("forward", function), ("both", with_gradient(function))):
            programs[name, part] = timing.compile_program(program, inputs)
            calls[f"{name}, {part}"] = functools.partial(programs[name, part].call, inputs)
    times = timing.race(calls, rounds)
    return {
        name: {
            part: {
                "median_ms": 1e3 * times[f"{name}, {part}"].median,
                "least_ms": 1e3 * times[f"{name}, {part}"].least,
                "compile_s": programs[name, part].compile_seconds,
                "temp_mib": programs[name, part].temp_mib,
                "peak_mib": programs[name, part].peak_mib,
            }
            for part in ("forward", "both")
        }
        for name in candidates
    }
