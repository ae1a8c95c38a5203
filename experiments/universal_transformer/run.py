"""Universal Transformer: beyond the trained length, and how long it ponders.

Trains it to copy, reverse and add short sequences beside a plain transformer of equal width and
depth, and asks both for longer ones; then lets an adaptive encoder follow chains of 1 to 3 facts.
Writes results.json and lengths.png; with --smoke, tiny models make a few steps and nothing is
written.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.universal_transformer import UniversalEncoderConfig, UniversalSeq2SeqConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.algorithmic import SPECIAL, chains, transduction
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.runs import versions
from jaxrec.training.tasks import train_task

HERE = Path(__file__).parent
BASE, ENTITIES, HOPS = 10, 5, 3
TRAINED = {"copy": 8, "reverse": 8, "addition": 4}
"""Digits of the longest sequences in training."""
ASKED = {"copy": (8, 10, 12, 16, 24), "reverse": (8, 10, 12, 16, 24), "addition": (4, 5, 6, 8)}
SIZES: dict[str, Any] = {"width": 64, "heads": 4, "mlp_width": 128}
UNIVERSAL = UniversalSeq2SeqConfig(
    vocab_size=BASE + SPECIAL, **SIZES, steps=4, context=32, start="random"
)
MODELS = {
    "Universal Transformer": UNIVERSAL,
    "transformer": dataclasses.replace(UNIVERSAL, steps=1, block_layers=UNIVERSAL.steps),
}
CHAINS = UniversalEncoderConfig(
    vocab_size=ENTITIES**2 + ENTITIES + HOPS + 1,
    **SIZES,
    steps=6,
    context=ENTITIES + 2,
    halting="position",
    halting_bias=-1.0,  # so that it begins with most of the loops, and learns to leave some out
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=600, help="of training; chains get four times as many"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    results = run(2 if options.smoke else options.steps, options.smoke)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(results, HERE / "lengths.png")


def run(steps: int, smoke: bool) -> dict[str, Any]:
    """Trains every model and returns what there is to report."""
    batch, examples = (32, 300) if not smoke else (2, 2)
    small = {"width": 8, "heads": 2, "mlp_width": 8} if smoke else {}
    began = time.perf_counter()
    results: dict[str, Any] = {"steps": steps, "batch": batch, "lengths": []}
    for rule in ("copy",) if smoke else TRAINED:
        for name, config in MODELS.items():
            config = dataclasses.replace(config, **small)
            found = lengths(rule, config, steps, batch, examples)
            results["lengths"].append({"task": rule, "model": name} | found)
            print(results["lengths"][-1], file=sys.stderr)
    encoder = dataclasses.replace(CHAINS, **small)
    results["chains"] = pondering(encoder, 4 * steps, 2 * batch, 4 * examples)
    return results | {"seconds": round(time.perf_counter() - began), "versions": versions()}


def optimizer(steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=3e-3, warmup_steps=min(100, steps), weight_decay=0.0, final_fraction=0.05
    )


def lengths(
    rule: Any, config: UniversalSeq2SeqConfig, steps: int, batch: int, examples: int
) -> dict[str, Any]:
    """Share of tokens, and of whole sequences, that are right at every length asked for.

    Every token is asked for behind the right ones. A sequence is all right then just when it is
    all right as the model would write it by itself.
    """
    began, trained = time.perf_counter(), (1, TRAINED[rule])
    results = train_task(
        config,
        lambda step: transduction(rule, batch, trained, base=BASE, seed=step).batch(),
        steps=steps,
        optimizer=optimizer(steps),
    )
    tokens, sequences = {}, {}
    for length in ASKED[rule]:
        asked = transduction(rule, examples, (length, length), base=BASE, seed=10**6 + length)
        options = asked.batch()
        labels = options.pop("labels")
        right = np.asarray(best(results.model, options)) == labels
        right, counts = right[labels != IGNORED], (labels != IGNORED)
        tokens[str(length)] = float(right.mean())
        sequences[str(length)] = float(right.reshape(examples, counts[0].sum()).all(1).mean())
    return {
        "parameters": parameters(results.model),
        "token_accuracy": tokens,
        "sequence_accuracy": sequences,
        "last_loss": float(results.losses[-20:].mean()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def pondering(
    config: UniversalEncoderConfig, steps: int, batch: int, examples: int
) -> dict[str, Any]:
    """Accuracy, and loops of the position that is asked, by the number of hops."""
    began = time.perf_counter()

    def data(examples: int, hops: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
        return chains(examples, entities=ENTITIES, hops=hops, seed=seed).batch()

    results = train_task(
        config,
        lambda step: data(batch, (1, HOPS), step),
        steps=steps,
        optimizer=optimizer(steps),
    )
    accuracy, loops = {}, {}
    for hops in range(1, HOPS + 1):
        asked = data(examples, (hops, hops), 10**6 + hops)
        logits, ponder = jax.jit(lambda model, tokens: model(tokens))(
            results.model, asked["inputs"]
        )
        right = jnp.argmax(logits[:, -1], axis=-1) == asked["labels"][:, -1]
        accuracy[str(hops)] = float(jnp.mean(right))
        loops[str(hops)] = {
            "asked_position": float(jnp.mean(ponder.steps[:, -1])),
            "all_positions": float(jnp.mean(ponder.steps)),
        }
    return {
        "parameters": parameters(results.model),
        "accuracy_by_hops": accuracy,
        "loops_by_hops": loops,
        "last_loss": float(results.losses[-20:].mean()),
        "seconds": round(time.perf_counter() - began, 1),
    }


@jax.jit
def best(model: Any, options: dict[str, Any]) -> Any:
    """The best token at every position."""
    rest = {name: x for name, x in options.items() if name != "inputs"}
    return jnp.argmax(model(options["inputs"], **rest)[0], axis=-1)


def parameters(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(model))


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of tokens that are right against the length, and loops against hops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, rule in zip(axes, TRAINED, strict=False):
        for found in (found for found in results["lengths"] if found["task"] == rule):
            shares = found["token_accuracy"]
            axis.plot([int(n) for n in shares], shares.values(), marker="o", label=found["model"])
        axis.axvline(TRAINED[rule], color="grey", linestyle=":")
        axis.set(title=rule, xlabel="digits (dotted: longest in training)", ylim=(0, 1.03))
    axes[0].set_ylabel("share of tokens right")
    axes[0].legend(frameon=False, fontsize=9)
    loops = results["chains"]["loops_by_hops"]
    counts = [each["asked_position"] for each in loops.values()]
    axes[3].plot(list(loops), counts, marker="o")
    axes[3].set(title="chains of facts", xlabel="hops", ylabel="loops of the asked position")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
