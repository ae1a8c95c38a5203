"""HRM on Sudoku: share of puzzles solved by the number of segments, and what halting saves.

Trains a small model on made puzzles of 4 x 4 with their symmetries and asks it for others. Writes
results.json and segments.png; with --smoke, a few steps of it and nothing is written. --full-scale
is the published run of 1000 puzzles of 9 x 9 with 1000 copies each; it needs an accelerator.
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

from jaxrec.models.hrm import SUDOKU_4X4, SUDOKU_27M, HRMConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data import sudoku
from jaxrec.training.data.puzzle_batches import GroupBatches, OrderedBatches
from jaxrec.training.puzzles import PuzzleSettings, train_puzzles
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
FULL_BATCH, FULL_EPOCHS = 384, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="segments of training")
    parser.add_argument("--smoke", action="store_true", help="a few steps, nothing written")
    parser.add_argument("--full-scale", type=Path, help="folder of the published run")
    options = parser.parse_args()
    if options.full_scale:
        print(json.dumps(full_scale(options.full_scale), indent=2))
        return
    results = run(4 if options.smoke else options.steps, 20 if options.smoke else 400)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results, HERE / "segments.png")


def run(steps: int, puzzles: int) -> dict[str, Any]:
    """Trains on `puzzles` of 4 x 4, asks for half as many others."""
    batch = 64
    clues = (8, 10)
    made = [sudoku.make(4, seed=0, index=i, clues=clues) for i in range(puzzles * 3 // 2)]
    settings = PuzzleSettings(
        steps=steps,
        eval_every=max(1, steps // 5),
        optimizer=OptimizerConfig(
            name="atan2",
            learning_rate=1e-3,
            weight_decay=0.1,
            clip_norm=None,
            warmup_steps=100,
            final_fraction=0.1,
        ),
    )
    training = sudoku.puzzle_set(made[:puzzles], augmentations=20, seed=0)
    held_out = sudoku.puzzle_set(made[puzzles:])
    results = trained(
        SUDOKU_4X4,
        GroupBatches([training], batch=batch, epochs=1 + batch // puzzles),
        OrderedBatches(held_out, batch=batch),
        settings,
    )
    questions = {question.tobytes() for question in training.inputs}
    return results | {
        "steps": steps,
        "batch": batch,
        "puzzles": puzzles,
        "clues": clues,
        "held_out": len(held_out.inputs),
        "held_out_and_in_training": sum(x.tobytes() in questions for x in held_out.inputs),
        "versions": versions(),
    }


def full_scale(folder: Path) -> dict[str, Any]:
    """Sudoku of 9 x 9 with as few clues as possible, as published but made here."""
    made = [sudoku.make(9, seed=0, index=i) for i in range(2000)]
    steps = FULL_EPOCHS * 1000 // FULL_BATCH
    settings = PuzzleSettings(
        steps=steps,
        puzzle_rate=7e-5,
        precision="bfloat16",
        optimizer=dataclasses.replace(
            PuzzleSettings(steps=1).optimizer, learning_rate=7e-5, warmup_steps=2000
        ),
    )
    train = sudoku.puzzle_set(made[:1000], augmentations=1000, seed=0)
    return trained(
        SUDOKU_27M,
        GroupBatches([train], batch=FULL_BATCH),
        OrderedBatches(sudoku.puzzle_set(made[1000:]), batch=FULL_BATCH),
        settings,
        folder,
    )


def trained(
    config: HRMConfig,
    train: GroupBatches,
    valid: OrderedBatches,
    settings: PuzzleSettings,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Trains in a folder, or in one that is thrown away, and returns the scores."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        model, scores = train_puzzles(
            config, train, valid, settings, folder or Path(scratch), stream=sys.stderr
        )
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "exact_accuracy_by_segment": scores.exact.tolist(),
        "accuracy_by_segment": [float(share) for share in scores.accuracy],
        "halted_exact_accuracy": scores.halted_exact,
        "halted_segments": scores.halted_segments,
        "max_segments": config.max_segments,
        "seconds": round(time.perf_counter() - began, 1),
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Share solved by the number of segments, and where halting ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    exact = results["exact_accuracy_by_segment"]
    axis.plot(range(1, len(exact) + 1), exact, marker="o", label="all puzzles get as many")
    axis.plot(
        results["halted_segments"],
        results["halted_exact_accuracy"],
        marker="*",
        markersize=14,
        linestyle="none",
        label="each halts by itself (mean)",
    )
    axis.set(xlabel="segments", ylabel="share of puzzles solved", ylim=(0, 1.03))
    axis.set_xticks(range(1, len(exact) + 1))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
