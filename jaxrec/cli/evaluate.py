"""`jaxrec eval RUN`: loss and bits per byte on the validation text, by depth."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a trained model on the validation side of its text."""

    run: tyro.conf.Positional[Path]
    """Run folder, as made by `jaxrec train` or `jaxrec convert`."""
    depths: str | None = None
    """Loop counts, such as 1,2,4,8,16; powers of two up to four times the trained mean if left
    out."""
    data: str | None = None
    """Other text to evaluate on: python-docs, a file, a folder, a glob, or token files; the run's
    if left out."""
    batches: int | None = None
    """Evaluate on this many batches of windows spread over the text; all of it if left out."""
    step: int | None = None
    """Checkpoint; the newest if left out."""
    ema: bool = False
    """The running average of the parameters."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: Arguments) -> int:
    """Prints the table, or JSON."""
    from jaxrec.training.evaluation import evaluate_run

    result, step = evaluate_run(
        arguments.run,
        depths=None if arguments.depths is None else _depths(arguments.depths),
        source=arguments.data,
        batches=arguments.batches,
        step=arguments.step,
        ema=arguments.ema,
    )
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "step": step, **dataclasses.asdict(result)}))
        return 0
    print(f"{arguments.run}, step {step}, {result.tokens:,} tokens of validation text")
    print(f"{'depth':>6}  {'nats/token':>10}  {'bits/byte':>9}")
    for depth, bits in result.bits_per_byte.items():
        print(f"{depth:>6}  {result.loss[depth]:10.4f}  {bits:9.4f}")
    return 0


def _depths(text: str) -> tuple[int, ...]:
    try:
        depths = tuple(int(part) for part in text.split(","))
    except ValueError:
        depths = (0,)
    if min(depths) < 1:
        raise UserError(
            f"--depths must be loop counts >= 1 with commas, such as 1,2,4; got {text!r}."
        )
    return depths
