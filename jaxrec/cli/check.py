"""`jaxrec check`: every method of every op on the devices of this machine, against float64."""

import contextlib
import functools
import json
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.cli import passes, timing
from jaxrec.cli.check_cases import Case, cases, spread_over
from jaxrec.errors import UserError, nearest
from jaxrec.training.sharding import build_mesh

TOLERANCE = 2e-5
"""Largest gap to float64, relative to the largest value. Measured on CPU: up to 3e-6."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Compare every method of every op with its definition in float64, forward and gradient."""

    ops: tuple[str, ...] = ()
    """Only these, such as linear_scan."""
    json: bool = False
    """Print JSON lines instead of a table."""


def run(arguments: Arguments) -> int:
    """Prints how far each method is off; returns 1 if one is too far, else 0.

    Raises:
      UserError: there is no such op.
    """
    found = cases()
    known = list(dict.fromkeys(case.op for case in found))
    for name in arguments.ops:
        if name not in known:
            raise UserError(
                f"There is no op {name!r}.{nearest(name, known)} There are {', '.join(known)}."
            )
    records = []
    for case in found:
        if case.op in (arguments.ops or known):
            timing.say(f"{case.op} {case.options}".rstrip())
            records += measure(case)
    publish(records, as_json=arguments.json)
    return 0 if all(record["right"] for record in records) else 1


def measure(case: Case) -> list[dict[str, Any]]:
    """How far each method in float32 is from the definition in float64, which is run on the CPU.

    Products of matrices are taken in full precision, which some devices do not do unasked.
    """

    def inputs(dtype: Any) -> Any:
        wide = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
        return jax.tree.map(
            lambda x: jnp.asarray(x, wide if np.iscomplexobj(x) else dtype), case.inputs
        )

    def function(method: str, inputs: Any) -> Any:
        return case.run(method, **inputs)

    want = passes.exact(functools.partial(function, case.methods[0]), inputs)
    records = []
    for method in case.methods:
        spread = case.spread and method != case.methods[0]
        mesh = jax.set_mesh(build_mesh(f"seq={spread_over()}")) if spread else None
        with mesh or contextlib.nullcontext(), jax.default_matmul_precision("highest"):
            got = passes.computed(functools.partial(function, method), inputs(jnp.float32))
        gaps = passes.gaps(got, want)
        of_gradients = {name for name in gaps if name.startswith("the gradient")}
        record: dict[str, Any] = {"op": case.op, "options": case.options, "method": method}
        # NumPy's maximum, unlike Python's, does not hide what is not a number.
        record["forward"] = float(np.max([gaps[name] for name in gaps.keys() - of_gradients]))
        record["gradient"] = float(np.max([gaps[name] for name in of_gradients]))
        record["right"] = record["forward"] <= TOLERANCE and record["gradient"] <= TOLERANCE
        records.append(record)
    return records


def publish(records: list[dict[str, Any]], *, as_json: bool) -> None:
    """Prints a table, or JSON lines, the machine first."""
    machine = timing.machine()
    if as_json:
        for line in ({"machine": machine, "tolerance": TOLERANCE}, *records):
            print(json.dumps(line))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "options", "method", "forward", "gradient", "")
    for x in records:
        gaps = f"{x['forward']:.1e}", f"{x['gradient']:.1e}"
        verdict = "" if x["right"] else "WRONG"
        table.add_row(x["op"], x["options"], x["method"], *gaps, verdict)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(table, highlight=False)
    right = sum(record["right"] for record in records)
    console.print(
        f"{right} of {len(records)} within {TOLERANCE:.0e} of float64, relative to the largest"
        f" value; {machine['devices']} x {machine['device']}, jax {machine['jax']}.",
        highlight=False,
    )
