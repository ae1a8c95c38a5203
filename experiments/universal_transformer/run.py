"""Universal Transformer: beyond the trained length, and how long it ponders.

Trains it to copy, reverse and add short sequences beside a plain transformer of equal width and
depth, and asks both for longer ones; then lets an adaptive encoder follow chains of 1 to 3 facts.
Writes results.json and lengths.png; with --smoke, tiny models make a few steps and nothing is
written; with --config FILE, all is as large as the file says, and the results stay on the screen.
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
import yaml

from jaxrec.config import from_dict
from jaxrec.models.universal_transformer import UniversalEncoderConfig, UniversalSeq2SeqConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.algorithmic import SPECIAL, chains, transduction
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.runs import versions
from jaxrec.training.tasks import train_task

HERE = Path(__file__).parent
BASE, ENTITIES, HOPS = 10, 5, 3
SIZES: dict[str, Any] = {"width": 64, "heads": 4, "mlp_width": 128}
UNIVERSAL = UniversalSeq2SeqConfig(
    vocab_size=BASE + SPECIAL, **SIZES, steps=4, context=32, start="random"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    model: UniversalSeq2SeqConfig = UNIVERSAL
    rules: tuple[str, ...] = ("copy", "reverse", "addition")
    asked: tuple[int, ...] = (8, 10, 12, 16, 24)  # digits; the first is the longest in training
    asked_sums: tuple[int, ...] = (4, 5, 6, 8)  # of each number, likewise
    steps: int = 2500  # of training
    sum_steps: int = 8000  # of training on sums
    chain_steps: int = 2400  # of training on chains, whose batches are twice as large
    batch: int = 32
    examples: int = 300  # asked of each length; four times as many of each number of hops
    learning_rate: float = 3e-3

    def lengths(self, rule: str) -> tuple[int, ...]:
        return self.asked_sums if rule == "addition" else self.asked


TINY = dataclasses.replace(UNIVERSAL, width=8, heads=2, mlp_width=8)
SMOKE = Scale(model=TINY, rules=("copy",), steps=2, sum_steps=2, chain_steps=2, batch=2, examples=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, help="fields of Scale, YAML")
    parser.add_argument("--smoke", action="store_true", help="tiny, nothing written")
    options = parser.parse_args()
    scale = SMOKE if options.smoke else Scale()
    if options.config is not None:
        scale = from_dict(Scale, yaml.safe_load(options.config.read_text()))
    results = run(scale)
    text = json.dumps(results, indent=2)
    print(text)
    if scale == Scale():
        (HERE / "results.json").write_text(text + "\n")
        plot(results, HERE / "lengths.png")


def run(scale: Scale) -> dict[str, Any]:
    """Trains every model and returns what there is to report."""
    began = time.perf_counter()
    results: dict[str, Any] = {"batch": scale.batch, "lengths": []}
    plain = dataclasses.replace(scale.model, steps=1, block_layers=scale.model.steps)
    models = {"Universal Transformer": scale.model, "transformer": plain}
    for rule in scale.rules:
        for name, config in models.items():
            found = lengths(rule, config, scale)
            results["lengths"].append({"task": rule, "model": name} | found)
            print(results["lengths"][-1], file=sys.stderr)
    results["chains"] = pondering(scale)
    return results | {"seconds": round(time.perf_counter() - began), "versions": versions()}


def optimizer(scale: Scale, steps: int) -> OptimizerConfig:
    rates = {"learning_rate": scale.learning_rate, "final_fraction": 0.05, "weight_decay": 0.0}
    return OptimizerConfig(**rates, warmup_steps=min(100, steps))


def lengths(rule: Any, config: UniversalSeq2SeqConfig, scale: Scale) -> dict[str, Any]:
    """Share of tokens, and of whole sequences, that are right at every length asked for.

    Every token is asked for behind the right ones. A sequence is all right then just when it is
    all right as the model would write it by itself.
    """
    began, examples = time.perf_counter(), scale.examples
    steps = scale.sum_steps if rule == "addition" else scale.steps
    trained = (1, scale.lengths(rule)[0])
    results = train_task(
        config,
        lambda step: transduction(rule, scale.batch, trained, base=BASE, seed=step).batch(),
        steps=steps,
        optimizer=optimizer(scale, steps),
    )
    best = jax.jit(lambda model, *, inputs, **rest: jnp.argmax(model(inputs, **rest)[0], axis=-1))
    tokens, sequences = {}, {}
    for length in scale.lengths(rule):
        asked = transduction(rule, examples, (length, length), base=BASE, seed=10**6 + length)
        options = asked.batch()
        labels = options.pop("labels")
        is_asked = labels != IGNORED
        right = (np.asarray(best(results.model, **options)) == labels)[is_asked]
        tokens[str(length)] = float(right.mean())
        sequences[str(length)] = float(right.reshape(examples, is_asked[0].sum()).all(1).mean())
    return {
        "parameters": parameters(results.model),
        "steps": steps,
        "token_accuracy": tokens,
        "sequence_accuracy": sequences,
        "last_loss": float(results.losses[-20:].mean()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def pondering(scale: Scale) -> dict[str, Any]:
    """Accuracy, and loops of the position that is asked, by the number of hops."""
    began, steps = time.perf_counter(), scale.chain_steps

    def data(examples: int, hops: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
        return chains(examples, entities=ENTITIES, hops=hops, seed=seed).batch()

    config = UniversalEncoderConfig(
        vocab_size=ENTITIES**2 + ENTITIES + HOPS + 1,
        **{name: getattr(scale.model, name) for name in SIZES},
        steps=6,
        context=ENTITIES + 2,
        halting="position",
        halting_bias=-1.0,  # begins with most of the loops, and learns to leave some out
    )
    results = train_task(
        config,
        lambda step: data(2 * scale.batch, (1, HOPS), step),
        steps=steps,
        optimizer=optimizer(scale, steps),
    )
    accuracy, loops = {}, {}
    for hops in range(1, HOPS + 1):
        asked = data(4 * scale.examples, (hops, hops), 10**6 + hops)
        answer = jax.jit(lambda model, tokens: model(tokens))
        logits, ponder = answer(results.model, asked["inputs"])
        right = jnp.argmax(logits[:, -1], axis=-1) == asked["labels"][:, -1]
        accuracy[str(hops)] = float(jnp.mean(right))
        at_asked, at_all = float(jnp.mean(ponder.steps[:, -1])), float(jnp.mean(ponder.steps))
        loops[str(hops)] = {"asked_position": at_asked, "all_positions": at_all}
    return {
        "parameters": parameters(results.model),
        "steps": steps,
        "accuracy_by_hops": accuracy,
        "loops_by_hops": loops,
        "last_loss": float(results.losses[-20:].mean()),
        "seconds": round(time.perf_counter() - began, 1),
    }


def parameters(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(model))


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of tokens that are right against the length, and loops against hops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), layout="constrained")
    for axis, rule in zip(axes, Scale.rules, strict=False):
        for found in (found for found in results["lengths"] if found["task"] == rule):
            shares = found["token_accuracy"]
            axis.plot([int(n) for n in shares], shares.values(), marker="o", label=found["model"])
        axis.axvline(Scale().lengths(rule)[0], color="grey", linestyle=":")
        axis.set(title=rule, xlabel="digits (dotted: longest in training)", ylim=(0, 1.03))
    axes[0].set_ylabel("share of tokens right")
    axes[0].legend(frameon=False, fontsize=9)
    loops = results["chains"]["loops_by_hops"]
    counts = [each["asked_position"] for each in loops.values()]
    axes[3].plot(list(loops), counts, marker="o")
    axes[3].set(title="chains of facts", xlabel="hops", ylabel="loops of the asked position")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
