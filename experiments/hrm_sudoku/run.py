"""HRM on Sudoku: share of puzzles solved by the number of segments, and what halting saves.

Trains two small models on made puzzles of 4 x 4 with their symmetries and asks them for others:
with the gradient of the last call of each stack, as published, and through all calls of the last
cycle with a running average, as TRM does. Writes results.json and segments.png; with --smoke, a few
steps of it and nothing is written. full_scale.yaml is the published run.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxrec.models.hrm import SUDOKU_4X4, HRMConfig
from jaxrec.training.config import PuzzleConfig, PuzzleDataConfig
from jaxrec.training.puzzles import train_puzzles
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
DATA = PuzzleDataConfig(source="sudoku-4x4")
EMA = 0.99
VARIANTS = {
    "one-step gradient": SUDOKU_4X4,
    "all of the last cycle, averaged": dataclasses.replace(
        SUDOKU_4X4, low_backprop=SUDOKU_4X4.low_cycles
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=PuzzleConfig.steps, help="segments, per model")
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing written")
    options = parser.parse_args()
    results = run(4 if options.smoke else options.steps, smoke=options.smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results["models"], HERE / "segments.png")


def run(steps: int, *, smoke: bool) -> dict[str, Any]:
    """Trains both."""
    data = dataclasses.replace(DATA, puzzles=20, held_out=10) if smoke else DATA
    config = PuzzleConfig(name="run", steps=steps, eval_every=0, save_every=0, data=data)
    models, about = {}, {}
    for name, model in VARIANTS.items():
        optimizer = config.optimizer
        if model.low_backprop > 1:
            optimizer = dataclasses.replace(optimizer, ema_decay=EMA)
        changed = dataclasses.replace(config, optimizer=optimizer)
        models[name], about = trained(name, model, changed)
    return {
        "steps": steps,
        "batch": config.batch,
        "ema_decay": EMA,
        "models": models,
        "data": about,
        "versions": versions(),
    }


def trained(
    name: str, model: HRMConfig, config: PuzzleConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains in a folder that is thrown away; returns the scores and what was learned from."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as runs:
        outcome = train_puzzles(name, model, config, runs=Path(runs), stream=sys.stderr)
    if outcome.evaluation is None:
        raise KeyboardInterrupt(outcome.stopped_by)
    found = {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(outcome.model, nnx.Param))),
        **dataclasses.asdict(outcome.evaluation),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return found, outcome.run.data


def plot(models: dict[str, Any], path: Path) -> None:
    """Share solved by the number of segments, and where halting ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, found in models.items():
        exact = found["exact"]
        (line,) = axis.plot(range(1, len(exact) + 1), exact, marker="o", label=name)
        axis.plot(
            found["halted_segments"],
            found["halted_exact"],
            marker="*",
            markersize=14,
            color=line.get_color(),
            markeredgecolor="k",
        )
    axis.set(xlabel="segments (star: each halts by itself)", ylabel="share of puzzles solved")
    axis.set(ylim=(0, 1.03))
    axis.set_xticks(range(1, len(exact) + 1))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
