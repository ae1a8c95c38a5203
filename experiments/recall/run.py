"""Multi-query associative recall: how accuracy grows with the state, for every rule of writing it.

Small language models that differ in the rule and the gate of their matrix state learn to name the
value of a key that they saw once; the state is made larger through its keys. Mamba-2, mLSTM, RWKV
and a transformer stand beside them. Writes results.json and recall.png; with --smoke, tiny models
make a few steps and nothing is written.
"""

import argparse
import json
from pathlib import Path
from time import process_time
from typing import Any

import jax
import numpy as np

from jaxrec.models.linear_attention import LinearAttentionConfig
from jaxrec.models.mamba2 import Mamba2Config
from jaxrec.models.recurrentgemma import RecurrentGemmaConfig
from jaxrec.models.rwkv import RWKVConfig
from jaxrec.models.xlstm import XLSTMConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.synthetic import associative_recall
from jaxrec.training.tasks import record, task_accuracy, train_task

HERE = Path(__file__).parent
VOCAB, PAIRS, TIME, WIDTH, BATCH = 32, 8, 32, 32, 32
KEY_WIDTHS = (2, 6, 18)
SHOWN = (125, 250, 500, 1000, 2000, 4000)  # numbers of state that the plot names
RULES: dict[str, dict[str, Any]] = {
    "linear attention": {},
    "RetNet": {"gate": "constant", "rotary_base": 10000.0},
    "GLA": {"gate": "logistic"},
    "DeltaNet": {"rule": "delta"},
    "Gated DeltaNet": {"rule": "delta", "gate": "step"},
    "KDA": {"rule": "delta", "gate": "key_step"},
}
NAMES = [*RULES, "Mamba-2", "mLSTM", "RWKV", "transformer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="of training, instead of those of each model")
    parser.add_argument("--rules", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--keys", nargs="+", type=int, default=[*KEY_WIDTHS], help="widths of keys")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    if options.smoke:
        models = [trained(name, 2, steps=3, examples=4) for name in options.rules]
        print(json.dumps({"models": models}, indent=2))
        return
    for name in options.rules:
        for keys in options.keys if name != "transformer" else KEY_WIDTHS[-1:]:
            found = trained(name, keys, steps=options.steps or steps(name), examples=500)
            print(json.dumps(found), flush=True)
            results = record(HERE / "results.json", found, place, batch=BATCH)
            plot(results, HERE / "recall.png")


def place(model: dict[str, Any]) -> tuple[int, int]:
    """Where a model stands in results.json."""
    return NAMES.index(model["name"]), model["keys"]


def trained(name: str, keys: int, *, steps: int, examples: int) -> dict[str, Any]:
    """Trains one model and returns what there is to report."""
    began = process_time()
    results = train_task(
        config(name, keys),
        lambda step: task(BATCH, step),
        steps=steps,
        optimizer=OptimizerConfig(
            learning_rate=5e-3 if name == "transformer" else 1e-2,
            warmup_steps=30,
            weight_decay=0.0,
            final_fraction=0.05,
        ),
    )
    return {
        "name": name,
        "keys": keys,
        "layers": results.model.config.layers,
        "parameters": sum(x.size for x in jax.tree.leaves(results.model)),
        "state_numbers": state_numbers(results.model),
        "steps": steps,
        "accuracy": task_accuracy(results.model, task(examples, 10**6)),
        "last_loss": float(np.mean(results.losses[-20:])),
        "processor_seconds": round(process_time() - began, 1),
    }


def steps(name: str) -> int:
    """Without a convolution a transformer first has to learn to look at the token before."""
    return 4000 if name == "transformer" else 800


def config(name: str, keys: int) -> Any:
    """One layer where a short convolution or a shift lets a key meet its value, else two."""
    shared = {"vocab_size": VOCAB, "width": WIDTH, "context": TIME}
    if name in RULES:
        return LinearAttentionConfig(
            **shared,
            layers=1,
            heads=1,
            key_width=keys,
            value_width=WIDTH,
            mlp_width=2 * WIDTH,
            conv_width=4,
            chunk=TIME,
            **RULES[name],
        )
    if name == "Mamba-2":  # twice as many values, and so half as many keys
        return Mamba2Config(**shared, layers=1, heads=4, head_width=16, state_size=keys // 2)
    if name == "mLSTM":
        return XLSTMConfig(
            **shared,
            layers=2,
            heads=1,
            key_width=keys,
            value_width=WIDTH,
            mlp_width=2 * WIDTH,
            chunk=TIME,
        )
    if name == "RWKV":  # three numbers of each channel and no keys: more channels
        return RWKVConfig(**shared, layers=1, inner_width=16 * keys, mlp_width=2 * WIDTH)
    return RecurrentGemmaConfig(
        **shared,
        layers=2,
        recurrent_width=WIDTH,
        heads=2,
        kv_heads=2,
        mlp_width=2 * WIDTH,
        window=TIME,
        pattern=("attention",),
        rotary_base=30.0,  # the token before has to be told from the others of a short sequence
        rotary_fraction=1.0,
    )


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
    axis.minorticks_off()
    axis.set_xticks(SHOWN, SHOWN)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
