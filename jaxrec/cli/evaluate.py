"""`jaxrec eval RUN`: loss and bits per byte on the validation text, by depth; of a solver, the
share of held-out puzzles that are solved, by segment; of a classifier, the share that is right.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jaxrec.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Evaluate a trained model on the validation side of its text, or on what else was held out."""

    run: tyro.conf.Positional[Path]
    """Run folder, as made by `jaxrec train` or `jaxrec convert`."""
    depths: str | None = None
    """Loop counts, such as 1,2,4,8,16; powers of two up to four times the trained mean if left
    out."""
    data: str | None = None
    """Other text to evaluate on: python-docs, a file, a folder, a glob, or token files; of a
    solver, other puzzles: sudoku-9x9, maze-10x10, a folder; of a classifier, other labelled
    sequences: digits, digits-permuted, an .npz file; the run's if left out."""
    batches: int | None = None
    """Evaluate on this many batches spread over the text or the puzzles, or the first ones of
    examples; all if left out."""
    rate: float | None = None
    """Of a classifier of digits: samples per pixel, for a signal sampled at another rate than in
    training; layers that know of time have their steps scaled to it. That of training if left out;
    a file has one sample per pixel."""
    step: int | None = None
    """Checkpoint; the newest if left out."""
    ema: bool = False
    """The running average of the parameters."""
    show: bool = False
    """Of a solver: print a grid as it is being solved, segment by segment."""
    puzzle: int = 0
    """With --show: which of the held-out puzzles."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: Arguments) -> int:
    """Prints the table, or JSON, or a grid."""
    from jaxrec.training.config import ClassifierConfig, PuzzleConfig
    from jaxrec.training.runs import read_run

    if arguments.batches is not None and arguments.batches < 1:
        raise UserError(f"--batches must be at least 1; got {arguments.batches}.")
    depths = None if arguments.depths is None else _depths(arguments.depths)
    config = read_run(arguments.run).config
    if arguments.rate is not None and not isinstance(config, ClassifierConfig):
        raise UserError(f"{arguments.run} is not the run of a classifier, which --rate is for.")
    if isinstance(config, ClassifierConfig):
        if depths is not None or arguments.show or arguments.puzzle:
            raise UserError(
                f"{arguments.run} is the run of a classifier; leave --depths, --show and --puzzle"
                " out."
            )
        return _run_examples(arguments)
    if isinstance(config, PuzzleConfig):
        if depths is not None:
            raise UserError(
                f"{arguments.run} is the run of a solver, which is scored after each of its"
                " segments. Leave --depths out."
            )
        return _show(arguments) if arguments.show else _run_puzzles(arguments)
    if arguments.show or arguments.puzzle:
        raise UserError(
            f"{arguments.run} is the run of a language model; --show and --puzzle are for solvers."
        )
    return _run_text(arguments, depths)


def _run_examples(arguments: Arguments) -> int:
    from jaxrec.training.classifier_runs import evaluate_classifier_run

    return _print_scores(
        arguments,
        functools.partial(evaluate_classifier_run, rate=arguments.rate),
        lambda scores: f"{scores.examples} held-out examples: {scores}",
    )


def _run_puzzles(arguments: Arguments) -> int:
    from jaxrec.training.puzzle_report import table
    from jaxrec.training.puzzles import evaluate_puzzles_run

    return _print_scores(
        arguments,
        evaluate_puzzles_run,
        lambda scores: f"{scores.puzzles} held-out puzzles\n{table(scores)}",
    )


def _show(arguments: Arguments) -> int:
    from jaxrec.training.puzzle_report import LEGEND, drawn, solving
    from jaxrec.training.puzzles import load_solver

    _, model, data, step = load_solver(
        arguments.run, source=arguments.data, step=arguments.step, ema=arguments.ema
    )
    count = len(data.valid.inputs)
    if not 0 <= arguments.puzzle < count:
        raise UserError(f"--puzzle must be 0 .. {count - 1}, got {arguments.puzzle}.")
    found = solving(model, data, arguments.puzzle)
    if arguments.json:
        grids = {
            "question": found.question.tolist(),
            "answers": found.answers.tolist(),
            "wanted": found.wanted.tolist(),
            "halts": found.halts.tolist(),
        }
        print(json.dumps({"run": str(arguments.run), "step": step, **grids}))
    else:
        print(f"{arguments.run}, step {step}, puzzle {arguments.puzzle}\n{LEGEND}\n")
        print(drawn(found, data.look))
    return 0


def _run_text(arguments: Arguments, depths: tuple[int, ...] | None) -> int:
    from jaxrec.training.evaluation import Evaluation, evaluate_run

    def table(result: Evaluation) -> str:
        lines = [
            f"{result.tokens:,} tokens of validation text",
            f"{'depth':>6}  {'nats/token':>10}  {'bits/byte':>9}",
        ]
        for depth, bits in result.bits_per_byte.items():
            lines.append(f"{depth:>6}  {result.loss[depth]:10.4f}  {bits:9.4f}")
        return "\n".join(lines)

    return _print_scores(arguments, functools.partial(evaluate_run, depths=depths), table)


def _print_scores(
    arguments: Arguments,
    evaluate: Callable[..., tuple[Any, int]],
    text: Callable[[Any], str],
) -> int:
    """What `evaluate` finds, as JSON or as a text."""
    scores, step = evaluate(
        arguments.run,
        source=arguments.data,
        batches=arguments.batches,
        step=arguments.step,
        ema=arguments.ema,
    )
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "step": step, **dataclasses.asdict(scores)}))
    else:
        print(f"{arguments.run}, step {step}, {text(scores)}")
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
