"""Multi-query associative recall: how accuracy grows with the state, for every rule of writing it.

Small language models that differ in the rule and the gate of their matrix state learn to name the
value of a key that they saw once; the state is made larger through its keys. Mamba and a
transformer stand beside them. Writes results.json and recall.png; with --smoke, tiny models make a
few steps and nothing is written.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.models.linear_attention import LinearAttentionConfig
from jaxrec.models.mamba2 import Mamba2Config
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.synthetic import associative_recall
from jaxrec.training.runs import versions
from jaxrec.training.tasks import task_accuracy, train_task

HERE = Path(__file__).parent
VOCAB, PAIRS, TIME, WIDTH, HEADS = 64, 8, 64, 64, 2
RULES: dict[str, dict[str, Any]] = {
    "linear attention": {},
    "RetNet": {"gate": "constant", "rotary_base": 10000.0},
    "GLA": {"gate": "logistic"},
    "DeltaNet": {"rule": "delta"},
    "Gated DeltaNet": {"rule": "delta", "gate": "step"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of training, for each model")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    results = run(3 if options.smoke else options.steps, options.smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results, HERE / "recall.png")


def run(steps: int, smoke: bool) -> dict[str, Any]:
    """Trains every model and returns what there is to report."""
    batch, examples = (64, 500) if not smoke else (4, 4)
    results: dict[str, Any] = {"steps": steps, "batch": batch, "models": []}
    for name, config in models((4, 16) if not smoke else (4,)):
        began = time.perf_counter()
        trained = train_task(
            config,
            lambda step: task(batch, step),
            steps=steps,
            optimizer=OptimizerConfig(
                learning_rate=4e-3, warmup_steps=30, weight_decay=0.0, final_fraction=0.1
            ),
        )
        results["models"].append(
            {
                "name": name,
                "state_numbers": state_numbers(trained.model),
                "accuracy": task_accuracy(trained.model, task(examples, 10**6)),
                "last_loss": float(np.mean(trained.losses[-20:])),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    return results | {"versions": versions()}


def models(key_widths: tuple[int, ...]) -> list[tuple[str, Any]]:
    """Two layers each; every rule with keys of every width."""
    shared = {"vocab_size": VOCAB, "width": WIDTH, "layers": 2, "context": TIME}
    found: list[tuple[str, Any]] = []
    for keys in key_widths:
        for name, options in RULES.items():
            config = LinearAttentionConfig(
                **shared,
                heads=HEADS,
                key_width=keys,
                value_width=WIDTH // HEADS,
                mlp_width=2 * WIDTH,
                conv_width=4,
                chunk=TIME,
                **options,
            )
            found.append((name, config))
        mamba = Mamba2Config(**shared, heads=4, head_width=32, state_size=keys // 2)
        found.append(("Mamba-2", mamba))
    transformer = RecurrentGemmaConfig(
        **shared,
        recurrent_width=WIDTH,
        heads=HEADS,
        kv_heads=HEADS,
        mlp_width=2 * WIDTH,
        window=TIME,
        pattern=("attention",),
    )
    return [*found, ("transformer", transformer)]


def task(examples: int, seed: int) -> dict[str, np.ndarray]:
    return associative_recall(examples, PAIRS, TIME, vocab=VOCAB, seed=seed).batch()


def state_numbers(model: Any) -> int:
    """Floats that one sequence keeps after TIME tokens."""
    state = jax.eval_shape(lambda model: model.init_state(1, capacity=TIME), model)
    return sum(x.size for x in jax.tree.leaves(state) if x.dtype == np.float32)


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy against the size of the state, one line per rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(model["name"] for model in results["models"]):
        points = [model for model in results["models"] if model["name"] == name]
        sizes = [model["state_numbers"] for model in points]
        axis.plot(sizes, [model["accuracy"] for model in points], marker="o", label=name)
    axis.set(
        xscale="log",
        ylim=(0, 1.03),
        xlabel="numbers of state per sequence",
        ylabel=f"accuracy, {PAIRS} pairs in {TIME} tokens",
    )
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
