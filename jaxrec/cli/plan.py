"""`jaxrec plan MODEL`: what a training run would need and send, as the compiler tells it."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrec.analysis import collectives
from jaxrec.cli.train import read_run_options
from jaxrec.errors import UserError, nearest
from jaxrec.models.hrm import HRMConfig, Rows
from jaxrec.training import sharding
from jaxrec.training.config import PuzzleConfig, TrainConfig
from jaxrec.training.flops import PEAK_FLOPS
from jaxrec.training.puzzles import build_puzzle_steps
from jaxrec.training.step import build_steps

HELP = """usage: jaxrec plan MODEL [options]

MODEL and its options are those of `jaxrec train`, such as --mesh fsdp=64 --time 4096 --batch 256
--precision bfloat16. Nothing is allocated: the step of training is compiled for as many virtual CPU
devices as the mesh has, which takes a minute for a large model."""
USED = 0.4
"""Share of the peak that products of matrices are assumed to reach."""
GIGA, GIB = 1e9, 2.0**30


class Card(NamedTuple):
    """What the estimate needs of a device."""

    kind: str  # in PEAK_FLOPS
    gigabytes: float
    link: float  # GB/s that one device sends, in one direction


CARDS = {
    # Memory and links: NVIDIA's data sheets (NVLink, one direction); Google Cloud's documentation
    # of each TPU (interchip links of a chip together).
    "A100": Card("NVIDIA A100", 80, 300),
    "H100": Card("NVIDIA H100", 80, 450),
    "H200": Card("NVIDIA H200", 141, 450),
    "v4": Card("TPU v4", 32, 300),
    "v5e": Card("TPU v5e", 16, 200),
    "v5p": Card("TPU v5p", 95, 600),
    "v6e": Card("TPU v6e", 32, 448),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is planned."""

    card: str = "H100"
    """Device whose speed is assumed: A100, H100, H200, v4, v5e, v5p or v6e."""
    json: bool = False
    """Print JSON instead of text."""


class Parsed(NamedTuple):
    """What the command is asked."""

    argv: list[str]
    path: str
    arguments: Any


def parse(argv: Sequence[str]) -> Parsed:
    """Reads MODEL and options, which are those of `jaxrec train`.

    Raises:
      UserError: as of `read_run_options`, or the card is unknown.
    """
    path, arguments = read_run_options(argv, "plan", HELP, Options())
    card = arguments.options.card
    if card not in CARDS:
        raise UserError(
            f"--card: {card!r} is unknown.{nearest(card, CARDS)} There are {', '.join(CARDS)}."
        )
    if not isinstance(arguments.train, TrainConfig | PuzzleConfig):
        raise UserError(
            f"{path} is a classifier; plans are made for language models, such as"
            " jaxrec.models.huginn:TINY, and solvers of puzzles."
        )
    return Parsed(list(argv), path, arguments)


def run(parsed: Parsed) -> int:
    """Prints the plan.

    Raises:
      UserError: model, batch and mesh do not belong together.
    """
    arguments = parsed.arguments
    needed = math.prod(sharding.parse_mesh(arguments.train.mesh).values())
    if jax.default_backend() != "cpu" or jax.device_count() < needed:
        return _with_devices(needed, parsed.argv)
    plan = make_plan(arguments.model, arguments.train, CARDS[arguments.options.card])
    if arguments.options.json:
        print(json.dumps(plan))
    else:
        print(text(parsed.path, arguments.train.mesh, arguments.options.card, plan))
    return 0


def _with_devices(count: int, argv: list[str]) -> int:
    """The same command in a process that sees so many virtual CPU devices."""
    flags = [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    flags.append(f"--xla_force_host_platform_device_count={count}")
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxrec.cli.main", "plan", *argv]
    return subprocess.run(command, env=environment, check=False).returncode


class Step(NamedTuple):
    """A step of training, not compiled yet."""

    lowered: Any
    state: dict[str, Any]  # abstract
    rows: tuple[int, int]  # rows of a batch, and tokens of each
    flops: float  # of the step
    depth: int | None = None  # loops
    free: int = 1  # of them without a gradient: what a loop of traced length is counted as


def make_plan(model_config: Any, config: TrainConfig | PuzzleConfig, card: Card) -> dict[str, Any]:
    """What a step of training needs on each device and sends, and how long it may take.

    The step is compiled for the mesh, on abstract shapes.

    Raises:
      UserError: model, batch and mesh do not belong together.
    """
    mesh = sharding.build_mesh(config.mesh)
    if isinstance(config, PuzzleConfig):
        step = _segment(model_config, config, mesh)
    else:
        step = _language_step(model_config, config, mesh)
    compiled = step.lowered.compile()
    memory = compiled.memory_analysis()
    found = collectives.exchanges(compiled.as_text(), dict(mesh.shape), loops=step.free)
    sent = collectives.by_axis(found)
    tokens, devices = math.prod(step.rows), mesh.size
    seconds = {
        "compute": step.flops / (devices * USED * PEAK_FLOPS[card.kind]),
        "exchange": sum(sum(kinds.values()) for kinds in sent.values()) / (card.link * GIGA),
    }
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(step.state["params"])),
        "devices": devices,
        "bytes_per_device": {
            "parameters": _on_each(step.state["params"]),
            "optimizer": _on_each(step.state["opt_state"]),
            "average": _on_each(step.state["ema"]),
            "carry": _on_each(step.state.get("carry")),
            "temporary": memory.temp_size_in_bytes,
        },
        "flops_per_token": step.flops / tokens,
        "flops_per_step": step.flops,
        "rows": step.rows[0],
        "tokens_per_row": step.rows[1],
        "tokens_per_step": tokens,
        "depth": step.depth,
        "sent_per_device": sent,
        "exchanges_per_step": collectives.times_by_axis(found),
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds.values()),
    }


def _language_step(model_config: Any, config: TrainConfig, mesh: Mesh) -> Step:
    sharding.check_batch(config.batch // config.accumulate, config.time, mesh)
    steps = build_steps(model_config, config, mesh)
    place = sharding.batch_sharding(mesh)
    shape = jax.ShapeDtypeStruct((config.batch, config.time), jnp.int32, sharding=place)
    batch = dict.fromkeys(("inputs", "labels", "segment_ids"), shape)
    depth = model_config.mean_depth
    train: Any = steps.train
    return Step(
        train.lower(steps.abstract, batch, jnp.int32(depth or 0)),
        steps.abstract,
        (config.batch, config.time),
        model_config.flops_per_token(config.time, depth, training=True) * math.prod(shape.shape),
        depth,
        # A loop of a traced length runs without a gradient before the graded loops.
        max(1, (depth or 0) - (getattr(model_config, "backprop_depth", None) or 0)),
    )


def _segment(model_config: HRMConfig, config: PuzzleConfig, mesh: Mesh) -> Step:
    """Of a solver of puzzles, whose loops are of known length."""
    steps = build_puzzle_steps(model_config, config, mesh)
    rows: Rows[Any] = steps.abstract["carry"].rows  # of the shapes of those that are offered
    train: Any = steps.train
    size = (config.batch, model_config.length)
    work = model_config.flops_per_segment(config.batch)
    return Step(train.lower(steps.abstract, rows), steps.abstract, size, work)


def _on_each(tree: Any) -> int:
    """Bytes of a tree of shapes on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def text(path: str, mesh: str, card_name: str, plan: dict[str, Any]) -> str:
    """The plan as a person reads it, with the formula of the estimate."""
    card, sizes = CARDS[card_name], plan["bytes_per_device"]
    total, room = sum(sizes.values()), card.gigabytes * GIGA
    verdict = f"of {room / GIB:.1f} of {card_name}" + ("" if total < room else ": DOES NOT FIT")
    at_depth = "" if plan["depth"] is None else f" at depth {plan['depth']}"
    lines = [
        f"{path}: {plan['parameters']:,} parameters on {plan['devices']} devices ({mesh})",
        f"a step: {plan['rows']} x {plan['tokens_per_row']} tokens,"
        f" {plan['flops_per_step']:.3g} FLOP ({plan['flops_per_token']:.3g} a token{at_depth})",
        "",
        "on each device, GiB:",
        *(f"  {name:<12}{size / GIB:10.3f}" for name, size in sizes.items()),
        f"  {'together':<12}{total / GIB:10.3f}  {verdict}",
        "  temporary: activations and gradients, as XLA plans them on CPU; other devices differ",
        "",
        "sent by each device in a step, MB, in so many exchanges:",
    ]
    for axes, kinds in sorted(plan["sent_per_device"].items()):
        for kind, sent in sorted(kinds.items()):
            times = plan["exchanges_per_step"][axes][kind]
            lines.append(f"  {axes:<12}{kind:<20}{sent / 1e6:12.3f}{times:8,}")
    if not plan["sent_per_device"]:
        lines.append("  nothing")
    peak, seconds = PEAK_FLOPS[card.kind], plan["seconds"]
    lines += [
        "",
        f"estimate: compute {seconds['compute']:.4g} s = FLOP / (devices x {USED} x"
        f" {peak:.3g} FLOP/s), exchange {seconds['exchange']:.4g} s = sent / {card.link:g} GB/s;",
        f"  the longer of the two gives {plan['tokens_per_second']:,.0f} tokens/s. Nothing was"
        f" measured on {card_name}.",
    ]
    return "\n".join(lines)
