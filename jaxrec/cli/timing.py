"""Timing on a machine that others use too: all is compiled first, then runs in turns."""

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

import jaxrec
from jaxrec.cli import bench_tables
from jaxrec.errors import UserError

MIB = 2.0**20
SETTINGS = ("XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
"""Environment variables that change speed, reported where they are set."""
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
"""Vector instructions by their flag in /proc/cpuinfo, the widest first."""


MATRIX = 1024
"""A machine's peak is its speed at a product of square matrices of this size."""


class WrongNumbers(Exception):
    """A candidate does not compute what it should, so its speed is of no interest."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What several runs of one candidate took, in seconds."""

    median: float
    least: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function with its arguments' shapes fixed."""

    call: Callable[..., Any]
    compile_seconds: float  # tracing and compiling
    temp_mib: (
        float | None
    )  # scratch memory of a call beyond arguments and results; None: not reported
    peak_mib: float | None  # arguments, results and scratch memory together


def compile_program(function: Callable[..., Any], *arguments: Any) -> Program:
    """Traces and compiles `function` for these arguments; it may be jitted already."""
    start = time.perf_counter()
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        return Program(compiled, seconds, None, None)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    return Program(compiled, seconds, temporary / MIB, (held + temporary) / MIB)


def race(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Runs all candidates in turns, `rounds` times, after one run each that does not count.

    In turns, because the speed of a machine drifts: what is timed one after another meets different
    machines. In another order every round, because memory that one call frees helps the next.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            start = time.perf_counter()
            jax.block_until_ready(candidates[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), rounds) for name, s in seconds.items()}


def matrix_product() -> Callable[[], Any]:
    """A large product of matrices, to run in turns with what is timed; see `peak`."""
    matrix = jnp.ones((MATRIX, MATRIX))
    return functools.partial(compile_program(jnp.matmul, matrix, matrix).call, matrix, matrix)


def peak(product: Timing) -> float:
    """Floating-point operations per second of `matrix_product`, at its fastest."""
    return 2 * MATRIX**3 / product.least


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Inside, compiling compiles: programs kept from earlier runs are not used."""
    from jax.experimental.compilation_cache import compilation_cache

    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX decides once whether the cache is in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def machine() -> dict[str, Any]:
    """What a timing depends on beside the code: devices, versions, processor, load, date."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu": _cpu_model(),
        "cpu_threads": cpu_threads(),
        "load_average": load_average(),
        "jaxrec": jaxrec.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "environment": " ".join(
            f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)
        ),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def load_average() -> float | None:
    """Processes that ran or wanted to, over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """Name, and the widest vectors where the system says so: clouds name many processors alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    values = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = values.get("flags", "").split()
    widest = next((f" ({name})" for flag, name in VECTORS.items() if flag in flags), "")
    return values.get("model name", platform.machine()) + widest


def say(text: str) -> None:
    """Progress, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def publish(report: dict[str, Any], *, as_json: bool, out: Path | None) -> None:
    """Prints a report as tables or JSON lines, the machine first, and writes a file if asked."""
    report["machine"]["load_average_after"] = load_average()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        head = {name: value for name, value in report.items() if name != "results"}
        for line in (head, *report["results"]):
            print(json.dumps(line))
        return
    from rich.console import Console
    from rich.table import Table

    # A file or a pipe has no width; rich would cut the tables at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(bench_tables.machine(report), highlight=False)
    for title, columns, rows in bench_tables.tables(report):
        table = Table(*(column.strip() for column in columns.split("|")), title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table, highlight=False)
    if out is not None:
        console.print(f"written to {out}", highlight=False)


def check_out(out: Path | None) -> None:
    """Refuses a place that cannot be written before minutes are spent on what it should hold.

    Raises:
      UserError: `out` is a folder, or lies below something that is not a folder.
    """
    if out is None:
        return
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file in it.")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(
            f"--out {out} cannot be written: {above} is not a folder that may be changed."
        )
