"""State-space layers on pixels in a row, in order and permuted, and at rates never trained on.

Writes results.json and accuracy.png; with --plot, draws accuracy.png from results.json alone; with
--smoke, tiny models run for seconds and nothing is written.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.layers.lssl import LSSLConfig
from jaxrec.layers.rglru import RGLRUConfig
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5Config
from jaxrec.models.sequence_classifier import SequenceClassifierConfig
from jaxrec.training.classification import (
    ClassificationData,
    ClassificationSettings,
    accuracy,
    train_classifier,
)
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.examples import Examples, digits, permuted, resampled
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
HELD_OUT = 360  # of 1797
RATES = {"half": (2.0, 0.5), "double": (0.5, 2.0)}  # factor on the step, samples per sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="two tiny models, one epoch, no results.json"
    )
    parser.add_argument(
        "--plot", action="store_true", help="train nothing, draw what is in results.json"
    )
    options = parser.parse_args()
    if options.plot:
        plot(json.loads((HERE / "results.json").read_text()))
        return
    smoke = options.smoke
    results = run(smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results)


def mixers(width: int, state: int) -> dict[str, Any]:
    """All causal, of the same width, with steps that span from a few pixels to all of them."""
    steps = {"dt_min": 0.01, "dt_max": 0.3}
    return {
        "S5": S5Config(width=width, state=state // 2, **steps),
        "S4D": S4DConfig(width=width, state=state, **steps),
        "LSSL": LSSLConfig(
            width=width,
            state=state // 2,
            dt_min=0.005,
            dt_max=0.05,
            train_transition=True,
            train_step=True,
        ),
        "RG-LRU": RGLRUConfig(width=width, heads=4),
    }


def data_of(signal: np.ndarray, labels: np.ndarray) -> ClassificationData:
    """The first examples are held out."""
    signal = signal[..., None]
    return ClassificationData(
        train=Examples(signal[HELD_OUT:], labels[HELD_OUT:]),
        valid=Examples(signal[:HELD_OUT], labels[:HELD_OUT]),
    )


def run(smoke: bool) -> dict[str, Any]:
    """Trains every mixer on each task, and tests the one trained on the pixels at other rates."""
    pixels, labels = digits()
    tasks = {
        "pixels": pixels,
        "permuted": permuted(pixels),
        "half rate, trained there": resampled(pixels, 0.5),
    }
    width, state, layers, epochs = (8, 4, 1, 1) if smoke else (48, 32, 2, 24)
    settings = ClassificationSettings(
        epochs=epochs,
        batch=64,
        state_space_rate=2e-3,
        optimizer=OptimizerConfig(
            learning_rate=8e-3,
            beta2=0.999,
            weight_decay=0.05,
            clip_norm=None,
            warmup_steps=20,
            final_fraction=0.0,
        ),
    )
    results: dict[str, Any] = {"epochs": epochs, "examples": len(labels) - HELD_OUT}
    for name, mixer in mixers(width, state).items():
        if smoke and name not in ("S5", "RG-LRU"):  # compiling is all that takes time
            continue
        config = SequenceClassifierConfig(
            inputs=1,
            classes=10,
            mixer=mixer,
            layers=layers,
            activation="full_glu",
            dropout=0.1,
        )
        row: dict[str, Any] = {}
        begin = time.perf_counter()
        for task, signal in list(tasks.items())[: 1 if smoke else None]:
            outcome = train_classifier(config, data_of(signal, labels), settings)
            row[task] = round(outcome.accuracy, 4)
            if task == "pixels":
                row |= other_rates(outcome.model, pixels, labels)
        row["minutes"] = round((time.perf_counter() - begin) / 60, 2)
        row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(outcome.model))
        results[name] = row
        print(name, row, file=sys.stderr)
    return results | {"versions": versions()}


def other_rates(model: Any, pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy on the same held-out signals sampled half and twice as often."""
    row = {}
    for name, (rescale, factor) in RATES.items():
        valid = data_of(resampled(pixels, factor), labels).valid
        row[f"{name} rate, as it is"] = round(accuracy(model, valid), 4)
        if not isinstance(model.config.mixer, RGLRUConfig):
            row[f"{name} rate, rescaled"] = round(accuracy(model, valid, step_rescale=rescale), 4)
    return row


def plot(results: dict[str, Any]) -> None:
    """Accuracy of each layer on each task, and at each rate, in accuracy.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {name: row for name, row in results.items() if isinstance(row, dict) and "pixels" in row}
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    tasks, rates = figure.subplots(1, 2, sharey=True)
    names = ("pixels", "permuted", "half rate, trained there")
    for i, (name, row) in enumerate(rows.items()):
        places = np.arange(len(names)) + 0.2 * (i - (len(rows) - 1) / 2)
        tasks.bar(places, [row[task] for task in names], 0.2, label=name)
        for kind, style in (("rescaled", "o-"), ("as it is", "x--")):
            if f"half rate, {kind}" in row:
                heights = [row[f"half rate, {kind}"], row["pixels"], row[f"double rate, {kind}"]]
                rates.plot([32, 64, 128], heights, style, color=f"C{i}", label=f"{name}, {kind}")
    tasks.set(ylabel="held-out accuracy", ylim=(0, 1.02), title="trained and tested on the same")
    tasks.set_xticks(range(len(names)), names)
    tasks.legend(fontsize=7, loc="lower right")
    rates.set(
        xscale="log", xlabel="samples per image", title="trained on 64, tested at other rates"
    )
    rates.set_xticks([32, 64, 128], ["32", "64", "128"])
    rates.minorticks_off()
    rates.legend(fontsize=7)
    for panel in (tasks, rates):
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "accuracy.png", dpi=100)


if __name__ == "__main__":
    main()
