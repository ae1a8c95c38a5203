"""Set disjointness: causal linear attention, a prefix without causality, and reading twice.

Three models of the same size are trained on two lists that share a token; accuracy is reported by
which list is the short one. Writes results.json and accuracy.png; with --smoke, tiny models make a
few steps and nothing is written.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxrec.models.prefix_linear import PrefixLMConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.data.synthetic import set_disjointness
from jaxrec.training.runs import versions
from jaxrec.training.tasks import task_accuracy, train_task

HERE = Path(__file__).parent
VOCAB, WIDTH = 36, 32
SIZES = ((2, 14), (14, 2))
READINGS = ("causal", "prefix", "read twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of training, for each model")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    results = run(4 if options.smoke else options.steps, options.smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results, HERE / "accuracy.png")


def run(steps: int, smoke: bool) -> dict[str, Any]:
    """Trains every reading with every feature width and returns what there is to report."""
    widths, batch, examples = ((2, 4), 32, 1000) if not smoke else ((2,), 4, 4)
    results: dict[str, Any] = {"steps": steps, "batch": batch, "models": []}
    started = time.perf_counter()
    for feature_width in widths:
        for reading in READINGS:
            config = PrefixLMConfig(
                vocab_size=VOCAB,
                width=WIDTH,
                mixers=("conv", "linear", "linear"),
                heads=2,
                mlp_width=2 * WIDTH,
                feature_width=feature_width,
                conv_expand=2,
                reads_prefix=reading == "prefix",
                mask_share=0.0,  # only the answer is asked for
            )
            began = time.perf_counter()
            trained = train_task(
                config,
                lambda step, reading=reading: mixed(batch, step, reading),
                steps=steps,
                optimizer=OptimizerConfig(
                    learning_rate=5e-3, warmup_steps=50, weight_decay=0.0, final_fraction=0.1
                ),
            )
            accuracy = {
                f"{a}_{b}": task_accuracy(trained.model, task(examples, a, b, 10**6, reading))
                for a, b in SIZES
            }
            results["models"].append(
                {
                    "reading": reading,
                    "feature_width": feature_width,
                    "state_numbers": 2 * (1 + feature_width + feature_width**2) * (WIDTH + 2),
                    "accuracy": accuracy,
                    "last_loss": float(np.mean(trained.losses[-50:])),
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
    return results | {
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "versions": versions(),
    }


def mixed(batch: int, step: int, reading: str) -> dict[str, np.ndarray]:
    """A batch of all sizes alike, padded on the left to one length."""
    parts = [task(batch // len(SIZES), a, b, step, reading) for a, b in SIZES]
    time = max(part["inputs"].shape[1] for part in parts)

    def pad(name: str, value: int) -> np.ndarray:
        rows = [
            np.pad(part[name], [(0, 0), (time - part[name].shape[1], 0)], constant_values=value)
            for part in parts
            if name in part
        ]
        return np.concatenate(rows)

    batch_of_all = {"inputs": pad("inputs", 0), "labels": pad("labels", IGNORED)}
    batch_of_all["segment_ids"] = (batch_of_all["inputs"] > 0).astype(np.int32)
    if reading == "prefix":
        batch_of_all["prefix"] = pad("prefix", 0).astype(bool)
    return batch_of_all


def task(examples: int, first: int, second: int, seed: int, reading: str) -> dict[str, np.ndarray]:
    """Sequences of one size, as a model reads them."""
    made = set_disjointness(examples, first, second, vocab=VOCAB, seed=seed).batch()
    if reading == "read twice":
        inputs, labels = made["inputs"], made["labels"]
        made["inputs"] = np.concatenate([inputs, inputs], axis=1)
        made["labels"] = np.concatenate([np.full_like(labels, IGNORED), labels], axis=1)
    if reading == "prefix":
        made["prefix"] = np.ones(made["inputs"].shape, bool)
    return made


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy by order of the lists, one panel per feature width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widths = sorted({model["feature_width"] for model in results["models"]})
    figure, axes = plt.subplots(1, len(widths), figsize=(5 * len(widths), 4), layout="constrained")
    for axis, width in zip(np.atleast_1d(axes), widths, strict=True):
        models = [model for model in results["models"] if model["feature_width"] == width]
        for i, model in enumerate(models):
            places = np.arange(len(SIZES)) + 0.27 * (i - 1)
            axis.bar(places, model["accuracy"].values(), 0.25, label=model["reading"])
        axis.set_xticks(range(len(SIZES)), [f"{a} then {b}" for a, b in SIZES])
        axis.set(ylim=(0, 1.02), xlabel="tokens of the first and second list", ylabel="accuracy")
        axis.set_title(f"{models[0]['state_numbers']:,} numbers of state")
        axis.spines[["top", "right"]].set_visible(False)
    handles = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, loc="outside upper center", ncols=len(READINGS))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
