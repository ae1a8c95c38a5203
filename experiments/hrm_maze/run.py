"""HRM on mazes: shortest paths found, by the number of segments and by their length.

Trains a small model on made mazes with one shortest path, turned and mirrored, and asks it for
others. Writes results.json and lengths.png; a run with other options than the defaults joins the
list `tried` of results.json instead; with --smoke, a few steps on tiny mazes and nothing is
written. full_scale.yaml is the published run.
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
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.models.hrm import HRM, MAZE_5X5, Positions, Rows
from jaxrec.training import pondering
from jaxrec.training.config import PuzzleConfig, PuzzleDataConfig
from jaxrec.training.data import mazes
from jaxrec.training.data.puzzle_sources import PuzzleData
from jaxrec.training.puzzles import train_puzzles
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
BATCH, STEPS = 64, 6000
CHANGES: dict[str, Any] = {
    "side": 5,
    "positions": MAZE_5X5.positions,
    "high_backprop": MAZE_5X5.high_backprop,
    "learning_rate": 1e-3,
}
"""What may be tried, and what it is by default."""
LONG = ("by_length", "data", "versions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="segments of training")
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing written")
    for name, value in CHANGES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    changes = {name: getattr(options, name) for name in CHANGES}
    results = run(4 if options.smoke else options.steps, smoke=options.smoke, **changes)
    if not options.smoke:
        before = json.loads((HERE / "results.json").read_text())
        if changes == CHANGES and options.steps == STEPS:
            results["tried"] = before.get("tried", [])
            plot(results["by_length"], HERE / "lengths.png")
        else:
            new = changes | {name: x for name, x in results.items() if name not in LONG}
            results = before | {"tried": [*before.get("tried", []), new]}
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def run(
    steps: int,
    *,
    smoke: bool,
    side: int,
    positions: Positions,
    high_backprop: int,
    learning_rate: float,
) -> dict[str, Any]:
    """Trains, and scores held-out mazes by segment and by length."""
    began = time.perf_counter()
    side = 4 if smoke else side
    data = PuzzleDataConfig(source=f"maze-{side}x{side}", puzzles=4000, held_out=300)
    model = dataclasses.replace(
        MAZE_5X5, length=side * side, positions=positions, high_backprop=high_backprop
    )
    if smoke:
        data = dataclasses.replace(data, puzzles=20, held_out=10)
    config = PuzzleConfig(
        name="run", steps=steps, batch=BATCH, eval_every=0, save_every=0, data=data
    )
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    config = dataclasses.replace(config, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as runs:
        outcome = train_puzzles("MAZE", model, config, runs=Path(runs), stream=sys.stderr)
    if outcome.evaluation is None:
        raise KeyboardInterrupt(outcome.stopped_by)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(outcome.model, nnx.Param))),
        "steps": steps,
        "batch": BATCH,
        **dataclasses.asdict(outcome.evaluation),
        **by_length(outcome.model, outcome.data),
        "seconds": round(time.perf_counter() - began, 1),
        "data": outcome.run.data,
        "versions": versions(),
    }


def by_length(model: HRM, data: PuzzleData) -> dict[str, Any]:
    """Shares of held-out mazes solved after each segment, in four groups by length of path; and of
    all their paths, what share is marked after each, and what share of the marks is right.
    """
    count = len(data.valid.inputs)
    rows = data.held_out(count)(0)
    found = jax.jit(pondering.solve)(model, Rows(*map(jnp.asarray, rows)))
    solved, steps = np.asarray(found.solved), 1 + np.sum(rows.labels == mazes.PATH, axis=1)
    path, marked = rows.labels == mazes.PATH, np.asarray(found.answers) == mazes.PATH
    right = np.sum(marked & path, axis=(1, 2))
    groups = np.array_split(np.argsort(steps, kind="stable"), 4)
    return {
        "path_marked": (right / np.sum(path)).tolist(),
        "marks_right": (right / np.maximum(np.sum(marked, axis=(1, 2)), 1)).tolist(),
        "by_length": [
            {
                "steps_of_path": [int(steps[group[0]]), int(steps[group[-1]])],
                "exact": np.mean(solved[:, group], axis=1).tolist(),
            }
            for group in groups
        ],
    }


def plot(groups: list[dict[str, Any]], path: Path) -> None:
    """A line for each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for group in groups:
        segments = range(1, len(group["exact"]) + 1)
        least, most = group["steps_of_path"]
        axis.plot(segments, group["exact"], marker="o", label=f"{least} to {most} steps")
    axis.set(xlabel="segments", ylabel="share of mazes solved", ylim=(0, 1.03))
    axis.set_xticks(list(segments))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, title="shortest path")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
