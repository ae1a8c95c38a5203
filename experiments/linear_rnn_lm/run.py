"""RG-LRU, Mamba, RecurrentGemma and a transformer as language models: equal parameters and time.

Each first makes a few steps to learn how long one takes, then a run of as many as fit into
--minutes. Writes results.json and curves.png; with --smoke, tiny models run for seconds and nothing
is written.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrec.models import linear_rnn, mamba, recurrentgemma
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from jaxrec.training.runs import versions

HERE = Path(__file__).parent
MODELS = {
    "RG-LRU": linear_rnn.TINY,
    "Mamba": mamba.TINY,
    "RecurrentGemma": recurrentgemma.TINY,
    "transformer": dataclasses.replace(recurrentgemma.TINY, pattern=("attention",), kv_heads=4),
}
"""Each has about a million parameters. The transformer is RecurrentGemma with attention in every
layer, over all of a sequence, and as many key-value heads as heads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.6, help="of training, for each model")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models, a few steps, nothing written"
    )
    options = parser.parse_args()
    results, curves = run(0 if options.smoke else options.minutes)
    text = json.dumps(results, indent=2)
    print(text)
    if not options.smoke:
        (HERE / "results.json").write_text(text + "\n")
        plot(curves, HERE / "curves.png")


def run(minutes: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains every model; returns what there is to report, and curves. 0 minutes: tiny models."""
    config = TrainConfig(
        batch=8,
        time=256,
        log_every=5,
        eval_every=0,
        eval_batches=16,
        save_every=0,
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.05),
    )
    if not minutes:
        config = dataclasses.replace(config, batch=2, time=32, eval_batches=1)
    results: dict[str, Any] = {"minutes_of_training": minutes, "models": {}}
    curves: dict[str, Any] = {}
    for name, model in MODELS.items():
        if not minutes:
            model = shrunk(model)
        steps = 2
        if minutes:
            steps = int(60 * minutes / seconds_per_step(model, config))
        with tempfile.TemporaryDirectory() as folder:
            outcome = train(
                name,
                model,
                dataclasses.replace(config, steps=steps, name="run"),
                runs=Path(folder),
                stream=sys.stderr,
            )
            lines = read(outcome.run.folder / "metrics.jsonl")
        assert outcome.evaluation is not None, "the run was not interrupted"
        curves[name] = curve(lines, config)
        results["models"][name] = {
            "parameters": sum(x.size for x in jax.tree.leaves(outcome.state["params"])),
            "steps": steps,
            "tokens": steps * config.batch * config.time,
            "training_seconds": round(curves[name]["seconds"][-1], 1),
            "bits_per_byte": round(next(iter(outcome.evaluation.bits_per_byte.values())), 4),
        }
    return results | {"data": outcome.data.provenance, "versions": versions()}, curves


def shrunk(model: Any) -> Any:
    """A model of the same kind that compiles and runs in seconds."""
    sizes = {"width": 16, "layers": 1}
    if isinstance(model, mamba.MambaConfig):
        return dataclasses.replace(model, **sizes, inner_width=16, step_rank=2)
    return dataclasses.replace(model, **sizes, recurrent_width=16, mlp_width=16)


def seconds_per_step(model: Any, config: TrainConfig) -> float:
    """The median over a short run, without its first steps."""
    short = dataclasses.replace(config, steps=20, log_every=1, eval_batches=1, name="short")
    with tempfile.TemporaryDirectory() as folder:
        outcome = train("short", model, short, runs=Path(folder), stream=sys.stderr)
        lines = read(outcome.run.folder / "metrics.jsonl")
    speeds = [line["tokens_per_second"] for line in lines if line["kind"] == "train"][5:]
    return config.batch * config.time / float(np.median(speeds))


def curve(lines: list[dict[str, Any]], config: TrainConfig) -> dict[str, list[float]]:
    """Bits per byte in training over bytes read and over seconds of training."""
    training = [line for line in lines if line["kind"] == "train"]
    steps = np.array([line["step"] for line in training])
    tokens = steps * config.batch * config.time
    speeds = np.array([line["tokens_per_second"] for line in training])
    seconds = np.cumsum(np.diff(tokens, prepend=0) / speeds)
    return {
        "tokens": tokens.tolist(),
        "seconds": seconds.tolist(),
        "bits_per_byte": [line["bits_per_byte"] for line in training],
    }


def plot(curves: dict[str, Any], target: Path) -> None:
    """The same curves over data and over time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axis in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for name, values in curves.items():
            bits = np.array(values["bits_per_byte"])
            smooth = np.convolve(np.pad(bits, 4, mode="edge"), np.ones(9) / 9, mode="valid")
            panel.plot(values[axis], smooth, label=name)
        panel.set(xlabel={"tokens": "bytes read", "seconds": "seconds of training"}[axis])
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="bits per byte in training", ylim=(1.8, 5))
    figure.axes[0].legend(frameon=False)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    main()
