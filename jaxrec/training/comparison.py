"""Language models side by side: the same data and settings, equal time of training."""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from jaxrec.models.protocol import LanguageModelConfig
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.loop import train
from jaxrec.training.metrics import read
from jaxrec.training.runs import versions

WARM = 5
"""So many of the first steps are not timed."""
CONFIG = TrainConfig(
    batch=8,
    time=256,
    log_every=5,
    eval_every=0,
    eval_batches=16,
    save_every=0,
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50, final_fraction=0.05),
)
"""Of models of about a million parameters, for minutes on two CPU threads."""
SMOKE = dataclasses.replace(CONFIG, batch=2, time=32, eval_batches=1)


def run_experiment(
    description: str,
    folder: Path,
    models: Mapping[str, LanguageModelConfig],
    small: Mapping[str, LanguageModelConfig],
    *,
    minutes: float,
) -> str:
    """The whole of an experiment that compares models for equal time: reads --minutes and --smoke,
    trains, and leaves results.json and curves.png in its folder; with --smoke the `small` models
    make two steps each and nothing is written. Returns the results as JSON.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes, help="of training, each model")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models, a few steps, nothing written"
    )
    options = parser.parse_args()
    if options.smoke:
        results, curves = equal_time(small, SMOKE, 0, stream=sys.stderr)
    else:
        results, curves = equal_time(models, CONFIG, options.minutes, stream=sys.stderr)
    text = json.dumps(results | {"versions": versions()}, indent=2)
    if not options.smoke:
        (folder / "results.json").write_text(text + "\n")
        plot_equal_time(curves, folder / "curves.png")
    return text


def equal_time(
    models: Mapping[str, LanguageModelConfig],
    config: TrainConfig,
    minutes: float,
    *,
    stream: TextIO | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains every model for as many steps as fit into the same time on this machine.

    Args:
      models: by the names they are reported under.
      config: of every run; its steps are not read.
      minutes: of training, for each model, counted by the steps of a short run before; 0: two steps
        each, to see that everything works.
      stream: where progress is shown; nowhere if None.

    Returns:
      What there is to report, and curves: by model, bits per byte in training, and the tokens and
      seconds of training until then. Nothing is kept on disk.

    Raises:
      UserError: as of `loop.train`.
    """
    rows: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, model in models.items():
        steps = 2
        if minutes:
            steps = max(2, int(60 * minutes / _seconds_per_step(model, config, stream)))
        with tempfile.TemporaryDirectory() as folder:
            outcome = train(
                name,
                model,
                dataclasses.replace(config, steps=steps, name="run"),
                runs=Path(folder),
                stream=stream,
            )
            lines = read(outcome.run.folder / "metrics.jsonl")
        if outcome.evaluation is None:
            raise KeyboardInterrupt(outcome.stopped_by)
        curves[name] = _curve(lines, config)
        rows[name] = {
            "parameters": sum(x.size for x in jax.tree.leaves(outcome.state["params"])),
            "steps": steps,
            "tokens": steps * config.batch * config.time,
            "training_seconds": round(curves[name]["seconds"][-1], 1),
            "bits_per_byte": round(next(iter(outcome.evaluation.bits_per_byte.values())), 4),
        }
    results = {"minutes_of_training": minutes, "models": rows, "data": outcome.data.provenance}
    return results, curves


def plot_equal_time(curves: Mapping[str, Any], target: Path) -> None:
    """Draws the curves of `equal_time` over data and over time, each the mean of nine points."""
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


def _seconds_per_step(
    model: LanguageModelConfig, config: TrainConfig, stream: TextIO | None
) -> float:
    """The median over a short run, without its first steps."""
    short = dataclasses.replace(config, steps=20, log_every=1, eval_batches=1, name="short")
    with tempfile.TemporaryDirectory() as folder:
        outcome = train("short", model, short, runs=Path(folder), stream=stream)
        lines = read(outcome.run.folder / "metrics.jsonl")
    speeds = [line["tokens_per_second"] for line in lines if line["kind"] == "train"][WARM:]
    return config.batch * config.time / float(np.median(speeds))


def _curve(lines: list[dict[str, Any]], config: TrainConfig) -> dict[str, list[float]]:
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
