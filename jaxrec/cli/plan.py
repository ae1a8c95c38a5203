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

from jaxrec.analysis import collectives
from jaxrec.cli.train import read_run_options
from jaxrec.errors import UserError, nearest
from jaxrec.training import sharding
from jaxrec.training.config import TrainConfig
from jaxrec.training.flops import PEAK_FLOPS
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
    if not isinstance(arguments.train, TrainConfig):
        raise UserError(
            f"{path} is no language model; plans are made for language models, such as"
            " jaxrec.models.huginn:TINY."
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
        print(text(parsed.path, arguments.train, arguments.options.card, plan))
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


def make_plan(model_config: Any, config: TrainConfig, card: Card) -> dict[str, Any]:
    """What a step of training needs on each device and sends, and how long it may take.

    The step is compiled for the mesh, on abstract shapes.

    Raises:
      UserError: model, batch and mesh do not belong together.
    """
    mesh = sharding.build_mesh(config.mesh)
    sharding.check_batch(config.batch // config.accumulate, config.time, mesh)
    steps = build_steps(model_config, config, mesh)
    place = sharding.batch_sharding(mesh)
    shape = jax.ShapeDtypeStruct((config.batch, config.time), jnp.int32, sharding=place)
    batch = dict.fromkeys(("inputs", "labels", "segment_ids"), shape)
    depth = model_config.mean_depth
    train: Any = steps.train
    compiled = train.lower(steps.abstract, batch, jnp.int32(depth or 0)).compile()
    memory = compiled.memory_analysis()
    # A loop of a traced length runs without a gradient before the graded loops.
    free = max(1, (depth or 0) - (getattr(model_config, "backprop_depth", None) or 0))
    found = collectives.exchanges(compiled.as_text(), dict(mesh.shape), loops=free)
    sent = collectives.by_axis(found)
    state = steps.abstract
    tokens, devices = config.batch * config.time, mesh.size
    flops = model_config.flops_per_token(config.time, depth, training=True)
    seconds = {
        "compute": flops * tokens / (devices * USED * PEAK_FLOPS[card.kind]),
        "exchange": sum(sum(kinds.values()) for kinds in sent.values()) / (card.link * GIGA),
    }
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state["params"])),
        "devices": devices,
        "bytes_per_device": {
            "parameters": _on_each(state["params"]),
            "optimizer": _on_each(state["opt_state"]),
            "average": _on_each(state["ema"]),
            "temporary": memory.temp_size_in_bytes,
        },
        "flops_per_token": flops,
        "flops_per_step": flops * tokens,
        "tokens_per_step": tokens,
        "depth": depth,
        "sent_per_device": sent,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds.values()),
    }


def _on_each(tree: Any) -> int:
    """Bytes of a tree of shapes on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def text(path: str, config: TrainConfig, card_name: str, plan: dict[str, Any]) -> str:
    """The plan as a person reads it, with the formula of the estimate."""
    card, sizes = CARDS[card_name], plan["bytes_per_device"]
    total, room = sum(sizes.values()), card.gigabytes * GIGA
    verdict = f"of {room / GIB:.1f} of {card_name}" + ("" if total < room else ": DOES NOT FIT")
    at_depth = "" if plan["depth"] is None else f" at depth {plan['depth']}"
    lines = [
        f"{path}: {plan['parameters']:,} parameters on {plan['devices']} devices ({config.mesh})",
        f"a step: {config.batch} x {config.time} tokens, {plan['flops_per_step']:.3g} FLOP"
        f" ({plan['flops_per_token']:.3g} a token{at_depth})",
        "",
        "on each device, GiB:",
        *(f"  {name:<12}{size / GIB:10.3f}" for name, size in sizes.items()),
        f"  {'together':<12}{total / GIB:10.3f}  {verdict}",
        "  temporary: activations and gradients, as XLA plans them on CPU; other devices differ",
        "",
        "sent by each device in a step, MB:",
    ]
    for axes, kinds in sorted(plan["sent_per_device"].items()):
        for kind, sent in sorted(kinds.items()):
            lines.append(f"  {axes:<12}{kind:<20}{sent / 1e6:12.3f}")
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
