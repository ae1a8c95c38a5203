"""HRM on Sudoku: share of puzzles solved by the number of segments, and what halting saves.

The part 4x4 trains two small models on made puzzles with their symmetries and asks them for others:
with the gradient of the last call of each stack, as published, and through all calls of the last
cycle with a running average, as TRM does. The part 9x9 trains the second kind on puzzles with many
clues. Writes results.json, where a part that was not run stays as it was, and segments.png; with
--smoke, a few steps of both and nothing is written. full_scale.yaml is the published run.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxrec.models.hrm import SUDOKU_4X4, HRMConfig
from jaxrec.training.config import PuzzleConfig, PuzzleDataConfig
from jaxrec.training.puzzles import train_puzzles
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
EMA = 0.99
AVERAGED = "all of the last cycle, averaged"
SMALL_9X9 = dataclasses.replace(
    SUDOKU_4X4, vocab_size=11, length=81, low_backprop=SUDOKU_4X4.low_cycles
)
VARIANTS = {
    "4x4": {
        "one-step gradient": SUDOKU_4X4,
        AVERAGED: dataclasses.replace(SUDOKU_4X4, low_backprop=SUDOKU_4X4.low_cycles),
    },
    "9x9": {AVERAGED: SMALL_9X9},
}
DATA = {
    "4x4": PuzzleDataConfig(source="sudoku-4x4"),
    "9x9": PuzzleDataConfig(source="sudoku-9x9", puzzles=1000, clues=(60, 70)),
}
CONFIG = PuzzleConfig(name="run", eval_every=0, save_every=0)
BATCH = {"4x4": CONFIG.batch, "9x9": 32}
STEPS = {"4x4": CONFIG.steps, "9x9": 10_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=tuple(VARIANTS), default=["4x4"])
    parser.add_argument("--steps", type=int, help="segments of training, per model")
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing written")
    options = parser.parse_args()
    file = HERE / "results.json"
    results = {} if options.smoke else json.loads(file.read_text())
    for part in VARIANTS if options.smoke else options.parts:  # the others stay as they are
        steps = 4 if options.smoke else options.steps or STEPS[part]
        results[part] = run(part, steps, smoke=options.smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        file.write_text(text + "\n")
        plot(results, HERE / "segments.png")


def run(part: str, steps: int, *, smoke: bool) -> dict[str, Any]:
    """Trains the models of a part."""
    data = dataclasses.replace(DATA[part], puzzles=20, held_out=10) if smoke else DATA[part]
    config = dataclasses.replace(CONFIG, steps=steps, batch=BATCH[part], data=data)
    models, about = {}, {}
    for name, model in VARIANTS[part].items():
        optimizer = config.optimizer
        if model.low_backprop > 1:
            optimizer = dataclasses.replace(optimizer, ema_decay=EMA)
        changed = dataclasses.replace(config, optimizer=optimizer)
        models[name], about = trained(name, model, changed)
    return {
        "steps": steps,
        "batch": config.batch,
        "ema_decay": EMA,
        "clues": data.clues,
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
        lines = (outcome.run.folder / "metrics.jsonl").read_text().splitlines()
    if outcome.evaluation is None:
        raise KeyboardInterrupt(outcome.stopped_by)
    found = {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(outcome.model, nnx.Param))),
        **dataclasses.asdict(outcome.evaluation),
        "training_segments": training_segments(map(json.loads, lines)),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return found, outcome.run.data


def training_segments(lines: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step, and the mean number of segments that puzzles which halted since the line before had:
    below the most there are, halting saves computing.
    """
    return [
        (line["step"], round(line["segments"], 2))
        for line in lines
        if line["kind"] == "train" and "segments" in line
    ]


def plot(parts: dict[str, Any], path: Path) -> None:
    """Share solved by the number of segments, and where halting ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for part, results in parts.items():
        for name, found in results["models"].items():
            exact = found["exact"]
            label = f"{part}, {name}"
            (line,) = axis.plot(range(1, len(exact) + 1), exact, marker="o", label=label)
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
