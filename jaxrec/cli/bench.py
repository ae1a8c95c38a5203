"""`jaxrec bench KIND`: timings beside those of peers, run in turns.

Nothing is timed that computes the wrong numbers: every candidate first meets its definition at a
small size, and a candidate that fails ends the command with status 1.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxrec.errors import UserError, nearest

Part = Literal["step", "remat", "depth", "decode"]
ModelPart = Literal["forward", "both", "decode"]
Rule = Literal["gated", "delta"]
Decay = Literal["none", "head", "key"]
ParaCell = Literal["gru", "lstm"]
RecurrentSystem = Literal["mamba", "mamba2", "recurrentgemma", "rwkv", "xlstm"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark is asked."""

    rounds: int = 7
    """Runs of each candidate; medians are reported."""
    smoke: bool = False
    """Small shapes and one round, to see that everything runs. The numbers mean nothing."""
    json: bool = False
    """Print JSON lines instead of tables."""
    out: Path | None = None
    """Also write the results to this JSON file."""


@dataclass(frozen=True, kw_only=True)
class ScanArguments(Options):
    """Time linear_scan beside lax.scan, lax.associative_scan and recurrentgemma if installed."""

    shapes: tuple[str, ...] = ("8,4096,256", "1,65536,64")
    """Shapes b,t,d of the arrays."""
    methods: tuple[str, ...] = ("auto", "associative", "chunked")
    """Methods of linear_scan."""


@dataclass(frozen=True, kw_only=True)
class MatrixArguments(Options):
    """Time matrix_scan in chunks of several sizes and step by step, over lengths."""

    times: tuple[int, ...] = (512, 2048, 8192, 32768)
    """Lengths."""
    chunks: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Steps that are worked on together."""
    rules: tuple[Rule, ...] = ("gated", "delta")
    """What a step does to the state."""
    decays: tuple[Decay, ...] = ("head",)
    """Decays of the state: none, one for each head, or one for each channel of its keys."""


@dataclass(frozen=True, kw_only=True)
class GridArguments(Options):
    """Time grid_scan by every method, and pLSTM's classifier of images."""

    sides: tuple[int, ...] = (12, 24)
    """Nodes along each side of the grids."""
    images: tuple[int, ...] = (48, 96)
    """Pixels along each side of the images; patches have 4."""


@dataclass(frozen=True, kw_only=True)
class NewtonArguments(Options):
    """Time newton_scan of ParaRNN cells beside lax.scan and Newton's method as first written."""

    cells: tuple[ParaCell, ...] = ("gru", "lstm")
    """gru: a diagonal Jacobian; lstm: blocks of 2 x 2."""
    times: tuple[int, ...] = (256, 1024, 4096, 16384)
    """Lengths; on accelerators worth it up to 131072."""
    widths: tuple[int, ...] = (64, 256)
    """Channels of the state."""
    batch: int = 4
    """Sequences."""
    window: int = 1024
    """Steps of a window of those candidates that have some."""
    eager: bool = False
    """Also time a loop in Python whose every operation is sent by itself: minutes for long ones."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(Options):
    """Time a Huginn of width 256: forward pass, training step, what depth costs, decoding."""

    parts: tuple[Part, ...] = ("step", "remat", "depth", "decode")
    """step: forward and training step, beside PyTorch if installed; remat: a training step by what
    its backward pass computes again; depth: time and compile time by depth; decode: tokens per
    second from the cache, beside PyTorch if installed."""
    mlp_widths: tuple[int, ...] = (864, 512, 384)
    """Inner widths of the MLP. The first is that of the other parts; 864 has the published model's
    ratio to the width, 17920/5280."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Loops at which a training step is timed."""
    decode_depths: tuple[int, ...] = (4, 16, 32)
    """Loops at which decoding is timed."""
    decode_batches: tuple[int, ...] = (1, 8)
    """Prompts that are continued together."""


@dataclass(frozen=True, kw_only=True)
class ModelsArguments(Options):
    """Time recurrent language models of width 256 beside those of transformers if installed."""

    systems: tuple[RecurrentSystem, ...] = (
        "mamba",
        "mamba2",
        "recurrentgemma",
        "rwkv",
        "xlstm",
    )
    """Which models."""
    parts: tuple[ModelPart, ...] = ("forward", "both", "decode")
    """forward: logits; both: loss and gradient; decode: tokens per second at batch 1."""
    mlp_width: int = 384
    """Inner width of RecurrentGemma's MLP. 384 has the ratio to the width that transformers takes
    by default; 768 has that of the published models."""


@dataclass(frozen=True, kw_only=True)
class HRMArguments(Options):
    """Time a training segment of HRM (width 128) beside PyTorch, and its memory by cycles."""

    cycles: tuple[int, ...] = (1, 2, 4, 8)
    """Cycles of each kind for which memory is counted."""


KINDS: dict[str, type[Options]] = {
    "scan": ScanArguments,
    "matrix": MatrixArguments,
    "grid": GridArguments,
    "newton": NewtonArguments,
    "train": TrainArguments,
    "models": ModelsArguments,
    "hrm": HRMArguments,
}


def parse(argv: Sequence[str]) -> Options:
    """Reads what is to be timed, then its options.

    Raises:
      UserError: there is no such benchmark, or an option is wrong.
    """
    from jaxrec.cli.main import read_arguments

    kind, *rest = argv or ["--help"]
    if kind in ("-h", "--help"):
        print(f"usage: jaxrec bench {'|'.join(KINDS)} [OPTIONS]\n")
        for name, arguments in KINDS.items():
            print(f"  {name:<6} {arguments.__doc__}")
        print("\n`jaxrec bench scan --help` lists the options.")
        raise SystemExit(0)
    if kind not in KINDS:
        raise UserError(
            f"There is no benchmark {kind!r}.{nearest(kind, KINDS)} There are {', '.join(KINDS)}."
        )
    return read_arguments(KINDS[kind], rest, f"jaxrec bench {kind}")


def run(arguments: Options) -> int:
    """Prints the timings and returns the exit status: 1 if a candidate computes the wrong numbers.

    Raises:
      UserError: an argument does not fit.
    """
    from jaxrec.cli.timing import WrongNumbers

    kind = next(name for name, kind in KINDS.items() if isinstance(arguments, kind))
    benchmark = importlib.import_module(f"jaxrec.cli.bench_{kind}")
    try:
        benchmark.run(arguments)
    except WrongNumbers as error:
        print(f"jaxrec bench: {error} Nothing was timed.", file=sys.stderr)
        return 1
    return 0
