"""`jaxrec profile MODEL`: traces a step, a forward pass or decoding; says what takes the time."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.analysis import trace
from jaxrec.cli.train import read_run_options
from jaxrec.errors import UserError
from jaxrec.layers.apart import for_decoding
from jaxrec.models.hrm import Rows
from jaxrec.models.protocol import loop_inputs
from jaxrec.training import sharding
from jaxrec.training.config import ClassifierConfig, PuzzleConfig, TrainConfig
from jaxrec.training.puzzles import build_puzzle_steps
from jaxrec.training.step import build_steps

HELP = """usage: jaxrec profile MODEL [options]

MODEL and its options are those of `jaxrec train`, such as --batch 8 --time 256; the data is drawn.
--part says what is run: step, forward or decode. The trace goes to --out DIR, where TensorBoard
(plugin profile), XProf and Perfetto read it; the operations that take most time are printed, and
all are in DIR/operations.json."""
Part = Literal["step", "forward", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is traced."""

    part: Part = "step"
    """A step of training, a forward pass, or a step of decoding: one token for every row."""
    out: Path | None = None
    """Folder of the trace; profiles/ and the model's name if left out."""
    repeats: int = 3
    """Runs that are traced, after one that is not, >= 1."""
    top: int = 20
    """Operations that are printed, >= 1."""
    json: bool = False
    """Print JSON instead of a table."""


class Program(NamedTuple):
    """A compiled program and a way to run it once more."""

    text: str
    run: Callable[[], Any]


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """Reads MODEL and options.

    Raises:
      UserError: as of `read_run_options`, or a count is below 1, or a solver cannot do the part.
    """
    path, arguments = read_run_options(argv, "profile", HELP, Options())
    options = arguments.options
    if isinstance(arguments.train, ClassifierConfig):
        raise UserError(
            f"{path} classifies sequences; what is profiled are language models and solvers."
        )
    for name in ("repeats", "top"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1; got {getattr(options, name)}.")
    if options.part == "decode" and isinstance(arguments.train, PuzzleConfig):
        raise UserError(f"{path} solves puzzles and decodes nothing; use --part step or forward.")
    return path, arguments


def run(parsed: tuple[str, Any]) -> int:
    """Traces, and prints the table.

    Raises:
      UserError: model, batch and mesh do not belong together.
    """
    path, arguments = parsed
    options = arguments.options
    out = options.out or Path("profiles") / path.rpartition(".")[2].replace(":", "-").lower()
    record = profile(arguments.model, arguments.train, options.part, out, options.repeats)
    (out / "operations.json").write_text(json.dumps(record, indent=2) + "\n")
    if options.json:
        print(json.dumps(record))
    else:
        print(text(path, record, options.top))
        print(f"\nTrace: {out}   All operations: {out / 'operations.json'}")
    return 0


def profile(
    model_config: Any, config: Any, part: Part, out: Path, repeats: int = 3
) -> dict[str, Any]:
    """Traces a part and says what its operations took.

    Args:
      model_config: of a language model or a solver.
      config: sizes, mesh and precision of the run.
      part: what to run.
      out: folder of the trace.
      repeats: runs that are traced.

    Returns:
      part, device, repeats, seconds of a run by the clock, seconds of its operations, which may
      run beside each other, the share of each scope, and all operations by the time they took in
      a run.

    Raises:
      UserError: model, batch and mesh do not belong together.
    """
    program = _prepare(model_config, config, part)
    jax.block_until_ready(program.run())
    quiet = jax.profiler.ProfileOptions()
    quiet.python_tracer_level = 0
    with jax.profiler.trace(out, profiler_options=quiet):
        begun = time.perf_counter()
        for _ in range(repeats):
            jax.block_until_ready(program.run())
        seconds = (time.perf_counter() - begun) / repeats
    module = program.text.split(None, 2)[1].rstrip(",")  # "HloModule NAME, ..."
    rows = trace.table(trace.read_events(out), trace.operations(program.text), module)
    return {
        "part": part,
        "device": jax.devices()[0].device_kind,
        "repeats": repeats,
        "seconds": seconds,
        "operation_seconds": sum(row.nanoseconds for row in rows) / repeats / 1e9,
        "scopes": trace.by_scope(rows),
        "operations": [
            {
                "operation": row.operation,
                "kind": row.kind,
                "scope": row.scope,
                "count": row.runs / repeats,
                "seconds": row.nanoseconds / repeats / 1e9,
                "share": row.share,
            }
            for row in rows
        ],
    }


def text(path: str, record: dict[str, Any], top: int) -> str:
    """The tables of the scopes and of the operations that take most time."""
    shown = record["operations"][:top]
    lines = [
        f"{path}: {record['part']} on {record['device']}, {1e3 * record['seconds']:.2f} ms a run;"
        f" operations {1e3 * record['operation_seconds']:.2f} ms",
        "",
        f"{'share':>7}  scope (' its gradient)",
    ]
    lines += [f"{x:>7.1%}  {name or '-'}" for name, x in list(record["scopes"].items())[:top]]
    lines += ["", f"{'share':>7}{'ms':>10}{'count':>8}  {'kind':<12}{'scope':<32}operation"]
    for row in shown:
        lines.append(
            f"{row['share']:>7.1%}{1e3 * row['seconds']:>10.3f}{row['count']:>8.0f}"
            f"  {row['kind']:<12}{row['scope'] or '-':<32}{row['operation']}"
        )
    rest = record["operations"][top:]
    if rest:
        share, seconds = (sum(row[name] for row in rest) for name in ("share", "seconds"))
        lines.append(f"{share:>7.1%}{1e3 * seconds:>10.3f}{'':>8}  {len(rest)} others")
    return "\n".join(lines)


def _prepare(model_config: Any, config: Any, part: Part) -> Program:
    mesh = sharding.build_mesh(config.mesh)
    rng = np.random.default_rng(config.seed)
    if isinstance(config, PuzzleConfig):
        shape = (config.batch, model_config.length)
        tokens = rng.integers(0, model_config.vocab_size, shape, np.int32)
        rows = (tokens, tokens, np.zeros(config.batch, np.int32))
        solver = build_puzzle_steps(model_config, config, mesh)
        batch: Any = Rows(*sharding.put_rows(rows, mesh))
        return _part(solver, part, batch)
    sharding.check_batch(config.batch // config.accumulate, config.time, mesh)
    depth = model_config.mean_depth
    steps = build_steps(model_config, config, mesh)
    if part == "decode":
        return _decoding(steps.computing(steps.init()["params"]), config, depth)
    tokens = rng.integers(0, model_config.vocab_size, (config.batch, config.time), np.int32)
    host = {"inputs": tokens, "labels": tokens, "segment_ids": np.ones_like(tokens)}
    return _part(steps, part, sharding.put_batch(host, mesh), jnp.int32(depth or 0))


def _part(steps: Any, part: Part, *inputs: Any) -> Program:
    """A step of training or an evaluation; the state goes from one run to the next."""
    state = steps.init()
    if part == "forward":
        compiled = steps.evaluate.lower(state["params"], *inputs).compile()
        return Program(compiled.as_text() or "", lambda: compiled(state["params"], *inputs))
    compiled = steps.train.lower(state, *inputs).compile()

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, *inputs)
        return metrics

    return Program(compiled.as_text() or "", step)


def _decoding(model: Any, config: TrainConfig, depth: int | None) -> Program:
    """Steps of one token for each row, from an empty state."""
    state = model.init_state(config.batch, capacity=config.time, depth=depth)
    graph, variables = nnx.split(for_decoding(model))
    options = loop_inputs(model.config, depth, None)
    tokens = jnp.zeros((config.batch, 1), jnp.int32)

    def decode(variables: Any, tokens: Any, state: Any) -> tuple[Any, Any]:
        logits, state = nnx.merge(graph, variables)(tokens, state, **options)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), state

    compiled = jax.jit(decode).lower(variables, tokens, state).compile()

    def step() -> Any:
        nonlocal tokens, state
        tokens, state = compiled(variables, tokens, state)
        return tokens

    return Program(compiled.as_text() or "", step)
