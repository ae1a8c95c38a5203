"""HRM on mazes: shortest paths found, by the number of segments and by their length.

Trains a small model on made mazes with one shortest path, turned and mirrored, and asks it for
others. Writes results.json and lengths.png; with --smoke, a few steps on tiny mazes and nothing is
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

from jaxrec.models.hrm import HRM, MAZE_8X8, Rows
from jaxrec.training import pondering
from jaxrec.training.config import PuzzleConfig, PuzzleDataConfig
from jaxrec.training.data import mazes
from jaxrec.training.data.puzzle_sources import PuzzleData
from jaxrec.training.puzzles import train_puzzles
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="segments of training")
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing written")
    options = parser.parse_args()
    results = run(4 if options.smoke else options.steps, smoke=options.smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results["by_length"], HERE / "lengths.png")


def run(steps: int, *, smoke: bool) -> dict[str, Any]:
    """Trains, and scores held-out mazes by segment and by length."""
    began = time.perf_counter()
    data, model = PuzzleDataConfig(source="maze-8x8", puzzles=1000, held_out=300), MAZE_8X8
    if smoke:
        data = dataclasses.replace(data, source="maze-4x4", puzzles=20, held_out=10)
        model = dataclasses.replace(model, length=16)
    config = PuzzleConfig(
        name="run", steps=steps, batch=BATCH, eval_every=0, save_every=0, data=data
    )
    with tempfile.TemporaryDirectory() as runs:
        outcome = train_puzzles("MAZE", model, config, runs=Path(runs), stream=sys.stderr)
    if outcome.evaluation is None:
        raise KeyboardInterrupt(outcome.stopped_by)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(outcome.model, nnx.Param))),
        "steps": steps,
        "batch": BATCH,
        **dataclasses.asdict(outcome.evaluation),
        "by_length": by_length(outcome.model, outcome.data),
        "seconds": round(time.perf_counter() - began, 1),
        "data": outcome.run.data,
        "versions": versions(),
    }


def by_length(model: HRM, data: PuzzleData) -> list[dict[str, Any]]:
    """Shares of held-out mazes solved after each segment, in four groups by length of path."""
    count = len(data.valid.inputs)
    rows = data.held_out(count)(0)
    found = jax.jit(pondering.solve)(model, Rows(*map(jnp.asarray, rows)))
    solved, steps = np.asarray(found.solved), 1 + np.sum(rows.labels == mazes.PATH, axis=1)
    groups = np.array_split(np.argsort(steps, kind="stable"), 4)
    return [
        {
            "steps_of_path": [int(steps[group[0]]), int(steps[group[-1]])],
            "exact": np.mean(solved[:, group], axis=1).tolist(),
        }
        for group in groups
    ]


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
