"""Does an arrow point at a disc? Learned on small pictures, asked on ones of up to twice the size.

pLSTM, its modes alone, without positions, and a vision transformer of as many parameters, several
seeds each. Writes results.json, accuracy.png and responses.png; with --smoke, tiny models take a
few steps and nothing is written. With --full-scale one published run: its result is printed.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.analysis.impulse import impulse_figure
from jaxrec.models.plstm_vision import vision_config
from jaxrec.models.vit import ViTConfig
from jaxrec.training.classification import (
    ClassificationData,
    ClassificationSettings,
    Examples,
    accuracy,
    train_classifier,
)
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.arrows import WHITE, ArrowsConfig, pictures
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
VARIANTS: dict[str, dict[str, Any]] = {
    "pLSTM": {},
    "no positions": {"position": False},
    "P only": {"modes": ("P", "P")},
    "D only": {"modes": ("D", "D")},
}
NAMES = (*VARIANTS, "ViT")
DRAWN = 1000  # pictures at once: all of the published ones with three channels are 11 GB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What is learned from, by what, and for how long."""

    arrows: ArrowsConfig
    sizes: tuple[int, ...]  # of the pictures tested on; the first is that of training
    examples: tuple[int, int]  # for training, and for each test
    patch: int
    width: int
    heads: int
    layers: int  # pairs of pLSTM layers, or of a transformer's blocks
    mlp_width: int  # of the transformer, such that it has as many parameters
    inputs: int  # channels
    epochs: int
    batch: int
    rate: float
    warmup: int  # steps

    def model(self, name: str) -> Any:
        """The configuration of one of NAMES."""
        shared: dict[str, Any] = {
            "width": self.width,
            "heads": self.heads,
            "patch": self.patch,
            "grid": (self.sizes[0] // self.patch,) * 2,
            "classes": 2,
            "inputs": self.inputs,
        }
        if name == "ViT":
            blocks = {"layers": 2 * self.layers, "mlp_width": self.mlp_width}
            return ViTConfig(**shared, **blocks, pooling="mean")
        return vision_config(**shared, layers=self.layers, **VARIANTS[name])

    def settings(self, seed: int) -> ClassificationSettings:
        """Those of the published runs but for their length: one rate for everything."""
        rule = OptimizerConfig(
            learning_rate=self.rate,
            beta2=0.999,
            weight_decay=0.05,
            clip_norm=1.0,
            warmup_steps=self.warmup,
            final_fraction=1e-3,
        )
        return ClassificationSettings(
            epochs=self.epochs,
            batch=self.batch,
            seed=seed,
            state_space_rate=self.rate,
            optimizer=rule,
        )

    def of(self, size: int, seed: int, count: int) -> Examples:
        """White on black, so that nothing is zero; all channels are the same and kept once."""
        config = dataclasses.replace(self.arrows, image_size=(size, size), seed=seed)
        levels = np.empty((count, size, size, 1), np.uint8)
        labels = np.empty(count, np.int32)
        for start in range(0, count, DRAWN):
            part = slice(start, min(count, start + DRAWN))
            images, labels[part] = pictures(config, start, part.stop - start)
            levels[part] = WHITE - images[..., :1]
        return Examples(np.broadcast_to(levels, (count, size, size, self.inputs)), labels)


SMALL = Scale(
    arrows=ArrowsConfig(
        image_size=(24, 24),
        boundary_padding=4,
        min_radius=3,
        max_radius=4,
        arrow_length_min=8,
        arrow_length_max=12,
        min_dist_x_factor=1.5,
        min_dist_y_factor=1.5,
    ),
    sizes=(24, 30, 36, 48),
    examples=(20000, 1000),
    patch=6,
    width=32,
    heads=2,
    layers=1,
    mlp_width=128,
    inputs=1,
    epochs=3,
    batch=64,
    rate=4e-3,
    warmup=30,
)
SMOKE = dataclasses.replace(
    SMALL, sizes=(24, 30), examples=(8, 8), width=16, epochs=1, batch=4, warmup=1
)
PUBLISHED = Scale(
    arrows=ArrowsConfig(),
    sizes=(192, 384),
    examples=(100_000, 10_240),
    patch=16,
    width=192,
    heads=3,
    layers=6,
    mlp_width=768,
    inputs=3,
    epochs=50,
    batch=128,
    rate=3e-4,  # the best of 1e-4, 3e-4 and 1e-3 by validation
    warmup=781,  # one epoch
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two tiny models, nothing written")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model")
    parser.add_argument("--full-scale", action="store_true", help="one published run, printed")
    parser.add_argument("--model", choices=NAMES, default="pLSTM", help="of the published run")
    parser.add_argument("--seed", type=int, default=0, help="of the published run")
    parser.add_argument("--rate", type=float, default=3e-4, help="peak, of the published run")
    options = parser.parse_args()
    if options.full_scale:
        scale = dataclasses.replace(PUBLISHED, rate=options.rate)
        print(json.dumps(run(scale, (options.model,), (options.seed,)), indent=2))
        return
    if options.smoke:
        print(json.dumps(run(SMOKE, ("P only", "ViT"), (0,)), indent=2))
        return
    results = run(SMALL, NAMES, tuple(range(options.seeds)))
    print(json.dumps(results, indent=2))
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    impulse_figure().savefig(HERE / "responses.png", dpi=80)
    plot(results, HERE / "accuracy.png")


def run(scale: Scale, names: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Trains every model with every seed and tests it at every size."""
    train = scale.of(scale.sizes[0], 43, scale.examples[0])
    tests = {size: scale.of(size, 200042, scale.examples[1]) for size in scale.sizes}
    results: dict[str, Any] = {
        "sizes": list(scale.sizes),
        "steps": scale.epochs * (scale.examples[0] // scale.batch),
        "batch": scale.batch,
        "models": {},
    }
    for name in names:
        began = time.perf_counter()
        row: dict[str, Any] = {"accuracy": {str(size): [] for size in scale.sizes}, "losses": []}
        for seed in seeds:
            data = ClassificationData(train, tests[scale.sizes[0]])
            trained = train_classifier(scale.model(name), data, scale.settings(seed))
            for size, examples in tests.items():
                share = accuracy(trained.model, examples, batch=min(125, len(examples.labels)))
                row["accuracy"][str(size)].append(round(share, 4))
            row["losses"].append(round(float(np.mean(trained.losses[-50:])), 4))
        row["minutes"] = round((time.perf_counter() - began) / 60, 2)
        row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(trained.model))
        results["models"][name] = row
        print(name, row, file=sys.stderr, flush=True)
    return results | {"versions": versions()}


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy against the size of the pictures, the mean over seeds and each of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, sizes = figure.subplots(), results["sizes"]
    for i, (name, row) in enumerate(results["models"].items()):
        values = np.array([row["accuracy"][str(size)] for size in sizes])
        axes.plot(sizes, values.mean(axis=1), color=f"C{i}", marker="o", label=name)
        axes.plot(sizes, values, ".", color=f"C{i}", alpha=0.4)
    axes.set(xlabel=f"side of the pictures (trained on {sizes[0]})", ylabel="accuracy")
    axes.set_xticks(sizes)
    axes.axhline(0.5, color="0.7", linewidth=1)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
