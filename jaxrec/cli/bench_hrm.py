"""`jaxrec bench hrm`: a training segment of HRM, beside the same in PyTorch, and its memory by the
number of cycles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxrec.cli import bench, timing, torch_peer
from jaxrec.convert import engine
from jaxrec.errors import UserError
from jaxrec.models.hrm import HRM, HRMConfig, Rows
from jaxrec.training import pondering
from jaxrec.training.config import PuzzleConfig
from jaxrec.training.puzzles import build_puzzle_steps
from jaxrec.training.sharding import build_mesh

FIGURE = 0.70
"""Seconds that a segment of the original PyTorch program once took, at SIZES, on two cores."""
SIZES = HRMConfig(vocab_size=11, length=81, width=128, heads=4)
SMALL = HRMConfig(
    vocab_size=6, length=9, width=16, heads=2, high_layers=2, low_layers=1, max_segments=3
)
"""Where the two programs are compared, and what --smoke times."""
BATCH, SMALL_BATCH = 16, 3


def run(arguments: "bench.HRMArguments") -> None:
    """Times a segment, and prints what came out.

    Raises:
      UserError: an argument is not positive.
      WrongNumbers: PyTorch and this library do not agree.
    """
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {arguments.rounds}.")
    if not arguments.cycles or min(arguments.cycles) < 1:
        raise UserError(f"--cycles: expected numbers >= 1, got {arguments.cycles}.")
    timing.check_out(arguments.out)
    config, batch, rounds = SIZES, BATCH, arguments.rounds
    if arguments.smoke:
        config, batch, rounds = SMALL, SMALL_BATCH, 1
    peer = load_peer()
    if peer is not None:
        torch_peer.refuse_differences("PyTorch", peer_differences(peer))
        timing.say("PyTorch agrees: the loss, the states and every gradient")
    report: dict[str, Any] = {
        "benchmark": "hrm",
        "machine": timing.machine(),
        "rounds": rounds,
        "smoke": arguments.smoke,
        "sizes": dataclasses.asdict(config) | {"batch": batch},
        "torch": None if peer is None else peer.torch.__version__,
        "figure_s": FIGURE,
        "results": [],
    }
    with timing.without_compilation_cache():
        report["results"].append(measure(config, batch, rounds, peer))
        timing.say("a segment: timed")
        report["results"] += [memory(config, batch, cycles) for cycles in arguments.cycles]
    timing.publish(report, as_json=arguments.json, out=arguments.out)


def load_peer() -> Any | None:
    """The PyTorch program of this checkout; None without it or without PyTorch."""
    return torch_peer.load("hrm_torch")


def puzzles(config: HRMConfig, batch: int) -> Rows[Array]:
    """Questions and answers that are drawn."""
    tokens, labels = (
        jax.random.randint(key, (batch, config.length), 1, config.vocab_size, jnp.int32)
        for key in jax.random.split(jax.random.key(0))
    )
    return Rows(tokens, labels, jnp.zeros(batch, jnp.int32))


def measure(config: HRMConfig, batch: int, rounds: int, peer: Any | None) -> dict[str, Any]:
    """A step of training: a segment, the one that gives the target, the gradient, the update."""
    settings = PuzzleConfig(batch=batch)
    steps = build_puzzle_steps(config, settings, build_mesh("data=1"))
    rows, state = puzzles(config, batch), steps.init()
    weights = engine.to_tensors(engine.find("hrm"), steps.merge(state["params"]))
    program = timing.compile_program(steps.train, state, rows)

    def step() -> Array:
        nonlocal state
        state, metrics = program.call(state, rows)
        return metrics["loss"]

    calls: dict[str, Callable[[], Any]] = {"jaxrec": step, "matmul": timing.matrix_product()}
    if peer is not None:
        calls["torch"] = _torch_step(peer, config, settings, weights, rows)
    times = timing.race(calls, rounds)
    ours, peak, work = (
        times["jaxrec"],
        timing.peak(times["matmul"]),
        config.flops_per_segment(batch),
    )
    record: dict[str, Any] = {
        "part": "segment",
        "median_s": ours.median,
        "least_s": ours.least,
        "figure_to_ours": FIGURE / ours.median,
        "compile_s": program.compile_seconds,
        "temp_mib": program.temp_mib,
        "gflop": work / 1e9,
        "peak_gflop_per_s": peak / 1e9,
        "bound_s": work / peak,
    }
    if peer is not None:
        theirs = times["torch"]
        record["torch"] = {"median_s": theirs.median, "least_s": theirs.least}
        record |= {
            "to_ours_median": theirs.median / ours.median,
            "to_ours_least": theirs.least / ours.least,
        }
    return record


def memory(config: HRMConfig, batch: int, cycles: int) -> dict[str, Any]:
    """What the compiler plans for a step with so many cycles of each kind; nothing is run."""
    deep = dataclasses.replace(config, high_cycles=cycles, low_cycles=cycles)
    steps = build_puzzle_steps(deep, PuzzleConfig(batch=batch), build_mesh("data=1"))
    rows = jax.eval_shape(functools.partial(puzzles, deep, batch))
    program = timing.compile_program(steps.train, steps.abstract, rows)
    return {
        "part": "memory",
        "cycles": cycles,
        "compile_s": program.compile_seconds,
        "temp_mib": program.temp_mib,
    }


def _torch_step(
    peer: Any,
    config: HRMConfig,
    settings: PuzzleConfig,
    weights: dict[str, np.ndarray],
    rows: Rows[Array],
) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(timing.cpu_threads())
    model = peer.load(config, weights, engine.find("hrm").prefix)
    rule = settings.optimizer
    optimizer = peer.Atan2(model.parameters(), rule.learning_rate, rule.weight_decay)
    tokens, labels = torch_peer.to_torch(rows.tokens, rows.labels)
    shape = (*tokens.shape, config.width)
    taken = torch.zeros(len(tokens), dtype=torch.int64)
    carry = [start.expand(shape) for start in (model.H_init, model.L_init)]

    def step() -> None:
        loss, *states = peer.segment(model, tokens, labels, *carry, taken)
        (loss / len(tokens)).backward()
        optimizer.step()
        carry[:] = states

    return step


def peer_differences(peer: Any) -> dict[str, float]:
    """Largest differences of the loss, the states and each gradient, relative to their largest
    value, at a small size and from equal weights.
    """
    model = SMALL.build(rngs=nnx.Rngs(0))
    # Weights that begin at zero leave others without a gradient to compare.
    model.halt.kernel[...] = 0.1 * jax.random.normal(jax.random.key(1), (SMALL.width, 2))
    rows = puzzles(SMALL, SMALL_BATCH)
    carry = pondering.take_next(model, model.init_carry(rows), rows)
    still = jnp.ones(SMALL_BATCH)  # nobody explores
    explore = pondering.Draws(still, jnp.full(SMALL_BATCH, 2, jnp.int32))

    def loss(model: HRM) -> tuple[Array, pondering.Segment]:
        return pondering.segment(model, carry, None, explore)

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    table = engine.find("hrm")
    theirs = peer.load(SMALL, engine.to_tensors(table, model), table.prefix)
    their_value, high, low = peer.segment(
        theirs,
        *torch_peer.to_torch(rows.tokens, rows.labels, *carry.latent, carry.steps),
    )
    their_value.backward()
    pairs = {
        "the loss": (value, their_value.detach()),
        "the slow state": (found.carry.latent.high, high),
        "the fast state": (found.carry.latent.low, low),
    }
    their_gradient = {name: p.grad for name, p in theirs.named_parameters()}
    for name, value in engine.to_tensors(table, model, gradient).items():
        name = name.removeprefix(table.prefix)
        if name in their_gradient:  # the states' beginnings are not trained
            pairs[f"the gradient of {name}"] = (value, their_gradient[name])
    return {
        name: torch_peer.relative_error(np.asarray(one), other.numpy())
        for name, (one, other) in pairs.items()
    }
