"""Set disjointness: causal linear attention, a prefix without causality, and reading twice.

Models of the same size are trained on two lists that share a token; accuracy is reported by which
list is the short one. Writes results.json and accuracy.png; with --smoke, tiny models make a few
steps and nothing is written.
"""

import argparse
import json
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from jaxrec.models.prefix_linear import PrefixLMConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.data.synthetic import set_disjointness
from jaxrec.training.tasks import record, task_accuracy, train_task

HERE = Path(__file__).parent
VOCAB, WIDTH, BATCH, STEPS = 68, 24, 60, 8000
MIXERS = ("conv", "linear", "linear", "linear")
# To train on: the short lists are there to learn the task from.
SIZES = ((1, 4), (4, 1), (2, 8), (8, 2), (2, 24), (24, 2))
SHOWN = ((2, 24), (24, 2))
FEATURE_WIDTHS = (1, 2)
READINGS = ("causal", "prefix", "read twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, for each model")
    parser.add_argument("--readings", nargs="+", default=[*READINGS], choices=READINGS)
    parser.add_argument("--features", nargs="+", type=int, default=[*FEATURE_WIDTHS])
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    if options.smoke:
        models = [trained(reading, 1, 4, batch=6, examples=4) for reading in options.readings]
        print(json.dumps({"models": models}, indent=2))
        return
    for features in options.features:
        for reading in options.readings:
            found = trained(reading, features, options.steps, batch=BATCH, examples=1000)
            print(json.dumps(found), flush=True)
            results = record(HERE / "results.json", found, place, batch=BATCH)
            plot(results, HERE / "accuracy.png")


def place(model: dict[str, Any]) -> tuple[int, int]:
    """Where a model stands in results.json."""
    return model["feature_width"], READINGS.index(model["reading"])


def trained(
    reading: str, feature_width: int, steps: int, *, batch: int, examples: int
) -> dict[str, Any]:
    """Trains one model and returns what there is to report."""
    began = process_time()
    config = PrefixLMConfig(
        vocab_size=VOCAB,
        width=WIDTH,
        mixers=MIXERS,
        heads=1,
        mlp_width=2 * WIDTH,
        feature_width=feature_width,
        conv_expand=2,
        reads_prefix=reading == "prefix",
        mask_share=0.0,  # only the answer is asked for
    )
    results = train_task(
        config,
        lambda step: mixed(batch, step, reading),
        steps=steps,
        optimizer=OptimizerConfig(
            learning_rate=5e-3, warmup_steps=50, weight_decay=0.0, final_fraction=0.1
        ),
    )
    accuracy = {
        f"{a}_{b}": task_accuracy(results.model, task(examples, a, b, 10**6, reading))
        for a, b in SIZES
    }
    features = 1 + feature_width + feature_width**2
    return {
        "reading": reading,
        "feature_width": feature_width,
        "state_numbers": MIXERS.count("linear") * features * (WIDTH + 1),  # values and their sum
        "steps": steps,
        "accuracy": accuracy,
        "last_loss": float(np.mean(results.losses[-50:])),
        "processor_seconds": round(process_time() - began, 1),
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
            places = np.arange(len(SHOWN)) + 0.27 * (i - 1)
            shares = [model["accuracy"][f"{a}_{b}"] for a, b in SHOWN]
            axis.bar(places, shares, 0.25, label=model["reading"])
        axis.set_xticks(range(len(SHOWN)), [f"{a} then {b}" for a, b in SHOWN])
        axis.set(ylim=(0, 1.02), xlabel="tokens of the first and second list", ylabel="accuracy")
        axis.set_title(f"{models[0]['state_numbers']:,} numbers of state")
        axis.spines[["top", "right"]].set_visible(False)
    handles = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, loc="outside upper center", ncols=len(READINGS))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
