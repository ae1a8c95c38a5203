"""State-space layers on pixels in a row, in order and permuted, and at rates never trained on.

Writes results.json; with --smoke, tiny models run for seconds and nothing is written.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.layers.lssl import LSSLConfig
from jaxrec.layers.s4d import S4DConfig
from jaxrec.layers.s5 import S5Config
from jaxrec.models.sequence_classifier import RGLRUConfig, SequenceClassifierConfig
from jaxrec.training.classification import (
    ClassificationData,
    ClassificationSettings,
    Examples,
    accuracy,
    train_classifier,
)
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.digits import load_digits
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
HELD_OUT = 360  # of 1797
RATES = {"half": (2.0, 0.5), "double": (0.5, 2.0)}  # factor on the step, samples per sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smoke", action="store_true", help="two tiny models, one epoch, no results.json"
    )
    smoke = parser.parse_args().smoke
    results = run(smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not smoke:
        (HERE / "results.json").write_text(text + "\n")
        print(f"plot: {plot(results)}", file=sys.stderr)


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


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 images of 8 x 8 as rows of 64 numbers of zero mean, in a fixed random order."""
    images, labels = load_digits()
    pixels = images.reshape(len(images), -1)
    return (pixels - pixels.mean()) / pixels.std(), labels


def data_of(signal: np.ndarray, labels: np.ndarray) -> ClassificationData:
    """The first examples are held out."""
    signal = signal[..., None]
    return ClassificationData(
        train=Examples(signal[HELD_OUT:], labels[HELD_OUT:]),
        valid=Examples(signal[:HELD_OUT], labels[:HELD_OUT]),
    )


def resampled(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The signal that joins the pixels by straight lines, at `factor` samples for each."""
    at = np.arange(round(pixels.shape[1] * factor)) / factor
    index = np.arange(pixels.shape[1])
    return np.stack([np.interp(at, index, row) for row in pixels]).astype(np.float32)


def run(smoke: bool) -> dict[str, Any]:
    """Trains every mixer on each task, and tests the one trained on the pixels at other rates."""
    pixels, labels = digits()
    tasks = {
        "pixels": pixels,
        "permuted": pixels[:, np.random.default_rng(1).permutation(pixels.shape[1])],
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


def plot(results: dict[str, Any]) -> Path:
    """Accuracy of each layer at each rate, in a file of the temporary folder."""
    import matplotlib.pyplot as plt

    names = [name for name, row in results.items() if isinstance(row, dict) and "S" in name]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for kind, style in (("rescaled", "o-"), ("as it is", "x--")):
        for i, name in enumerate(names):
            row = results[name]
            heights = [row[f"half rate, {kind}"], row["pixels"], row[f"double rate, {kind}"]]
            axes.plot([32, 64, 128], heights, style, color=f"C{i}", label=f"{name}, {kind}")
    axes.set(xscale="log", xlabel="samples per image (trained on 64)", ylabel="accuracy")
    axes.set_xticks([32, 64, 128], ["32", "64", "128"])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    path = Path(tempfile.mkdtemp()) / "rates.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
