"""Depth at test time: bits per byte of the default language model, and a task that needs depth.

The text part evaluates a run of `make train`; it is trained first where there is none. In the task
a small Huginn works out sums, differences and products from left to right, modulo 5: each value
needs the one before. Writes results.json, text.png, task.png and the tables of README.md; with
--smoke, tiny models make a few steps and nothing is written.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.analysis.depth_use import latent_changes, loops_to_settle
from jaxrec.cli import main as jaxrec
from jaxrec.models.huginn import HuginnConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.synthetic import modular_arithmetic
from jaxrec.training.evaluation import evaluate_run
from jaxrec.training.runs import read_run, versions
from jaxrec.training.tasks import task_predictions, train_task

HERE = Path(__file__).parent
MARK = "<!-- Below this line everything is written by run.py. -->"
TRAIN = "jaxrec.models.huginn:TINY --data python-docs --steps 220 --optimizer.learning-rate 4e-3"
TINY = "--steps 2 --batch 2 --time 32 --eval-batches 1 --model.width 16 --model.heads 2"
TEXT_DEPTHS = (1, 2, 3, 4, 6, 8, 16, 32)
VALUES, ASKED = 12, 24  # values worked out in a row: in training, and when tested
SHOWN = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24)
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
SETTLED = 0.03  # relative change of the latent state, the published threshold
REASONER = HuginnConfig(
    vocab_size=8,  # five digits, three operators
    width=64,
    heads=4,
    mlp_width=128,
    prelude_layers=0,  # all that is computed is computed by the loop
    core_layers=1,
    coda_layers=0,
    context=64,
    mean_depth=4,
    backprop_depth=4,
    qk_bias=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/huginn-tiny"), help="of the text")
    parser.add_argument("--steps", type=int, default=3000, help="of training in the task")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "tiny" if options.smoke else options.run
        text = text_part(run, options.smoke)
    task = task_part(3 if options.smoke else options.steps, 8 if options.smoke else 500)
    results = {"text": text, "task": task, "versions": versions()}
    print(json.dumps(results, indent=2))
    if not options.smoke:
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        plot_text(text, HERE / "text.png")
        plot_task(task, HERE / "task.png")
        readme = HERE / "README.md"
        readme.write_text(f"{readme.read_text().partition(MARK)[0]}{MARK}\n\n{tables(results)}")


def text_part(run: Path, smoke: bool) -> dict[str, Any]:
    """Validation bits per byte of a run by depth."""
    if not (run / "run.json").exists():
        less = TINY if smoke else ""
        words = f"train {TRAIN} --name {run.name} --runs {run.parent} {less}".split()
        with contextlib.redirect_stdout(sys.stderr):
            status = jaxrec.main(words)
        assert status == 0, f"training ended with status {status}"
    depths = TEXT_DEPTHS[:2] if smoke else TEXT_DEPTHS
    evaluation, step = evaluate_run(run, depths=depths, batches=1 if smoke else 16)
    return {
        "steps": step,
        "mean_loops": read_run(run).model_config.mean_depth + 1,
        "tokens": evaluation.tokens,
        "bits_per_byte": {depth: round(x, 4) for depth, x in evaluation.bits_per_byte.items()},
    }


def task_part(steps: int, examples: int) -> dict[str, Any]:
    """Accuracy by depth of a model trained at random depths, and when it settles, by value."""
    began = time.perf_counter()
    trained = train_task(
        REASONER,
        lambda step: modular_arithmetic(64, 2 * VALUES - 1, seed=step).batch(),
        steps=steps,
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=50, weight_decay=0.0, final_fraction=0.05
        ),
    )
    seconds = time.perf_counter() - began
    test, key = modular_arithmetic(examples, 2 * ASKED - 1, seed=10**6).batch(), jax.random.key(0)

    def by_value(found: np.ndarray) -> list[float]:
        return [round(float(x), 4) for x in found[:, ::2].mean(axis=0)]

    accuracy = {}
    for depth in DEPTHS:
        best = task_predictions(trained.model, test, depth=depth, key=key)
        accuracy[depth] = by_value(best == test["labels"])
    other = task_predictions(trained.model, test, depth=DEPTHS[-1], key=jax.random.key(1))
    changes = latent_changes(trained.model, test["inputs"], depth=DEPTHS[-1], key=key)
    same = (best == other)[:, : 2 * VALUES : 2]
    return {
        "steps": steps,
        "minutes": round(seconds / 60, 2),
        "mean_loops": REASONER.mean_depth + 1,
        "last_loss": round(float(np.mean(trained.losses[-50:])), 4),
        "accuracy": accuracy,
        "loops_to_settle": by_value(loops_to_settle(np.asarray(changes), SETTLED)),
        "same_answer_from_another_latent": round(float(np.mean(same)), 4),
    }


def tables(results: dict[str, Any]) -> str:
    """What README.md says in numbers."""
    bits, task = results["text"]["bits_per_byte"], results["task"]
    lines = [
        f"Text, after {results['text']['steps']} steps of {results['text']['mean_loops']} loops in"
        f" the mean; {results['text']['tokens']:,} tokens of validation:",
        "",
        "| depth | " + " | ".join(bits) + " |",
        "|---|" + "---|" * len(bits),
        "| bits per byte | " + " | ".join(f"{x:.3f}" for x in bits.values()) + " |",
        "",
        f"Arithmetic, after {task['steps']} steps of {task['mean_loops']} loops in the mean, in"
        f" {task['minutes']} minutes; percent right of the 1st, 2nd, ... value of a row, of which"
        f" {VALUES} were trained:",
        "",
        "| depth | " + " | ".join(map(str, SHOWN)) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    for depth, row in task["accuracy"].items():
        lines.append(f"| {depth} | " + " | ".join(f"{100 * row[k - 1]:.0f}" for k in SHOWN) + " |")
    settle = " | ".join(f"{task['loops_to_settle'][k - 1]:.1f}" for k in SHOWN)
    same = 100 * task["same_answer_from_another_latent"]
    lines += [
        f"| loops to settle | {settle} |",
        "",
        f"From another initial latent state, {same:.1f} % of the first {VALUES} answers at depth"
        f" {DEPTHS[-1]} are the same.",
    ]
    return "\n".join(lines) + "\n"


def plot_text(text: dict[str, Any], path: Path) -> None:
    """Bits per byte against depth."""
    figure, axis = canvas(text["mean_loops"])
    depths = [int(depth) for depth in text["bits_per_byte"]]
    axis.plot(depths, list(text["bits_per_byte"].values()), marker="o")
    axis.set(ylabel="validation bits per byte")
    figure.savefig(path, dpi=100)


def plot_task(task: dict[str, Any], path: Path) -> None:
    """Accuracy against depth, one line for each value of a row."""
    import matplotlib.pyplot as plt

    figure, axis = canvas(task["mean_loops"])
    for i, k in enumerate(SHOWN):
        values = [row[k - 1] for row in task["accuracy"].values()]
        style = {"color": plt.colormaps["viridis"](i / len(SHOWN)), "label": f"value {k}"}
        axis.plot(list(task["accuracy"]), values, "o-" if k <= VALUES else "o--", **style)
    axis.set(ylabel="accuracy", ylim=(0, 1.03))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def canvas(mean: int) -> tuple[Any, Any]:
    """A figure over depth, with the mean of training marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.axvline(mean, color="grey", linestyle=":", linewidth=1)
    axis.set(xscale="log", xlabel="loops at test time; dotted: the mean of training")
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axis.minorticks_off()
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


if __name__ == "__main__":
    main()
