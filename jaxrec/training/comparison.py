"""Language models side by side: the same data and settings, equal time of training.

A run ends when its time is over, not after so many steps, and its learning rate follows the share
of the time that is over: how fast a model is decides how many steps it makes, and nothing else.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrec.errors import UserError
from jaxrec.models.protocol import LanguageModelConfig
from jaxrec.training import sharding
from jaxrec.training.config import OptimizerConfig, TrainConfig
from jaxrec.training.data import Batches, Data, load_data
from jaxrec.training.evaluation import evaluate
from jaxrec.training.loop import Meter, check_fits
from jaxrec.training.running import State
from jaxrec.training.runs import versions
from jaxrec.training.step import build_steps

PARTS = 10_000
"""Into which the time of a run is divided: what its schedule counts, in the place of steps."""
CONFIG = TrainConfig(
    steps=PARTS,
    batch=8,
    time=256,
    log_every=5,
    eval_batches=64,
    optimizer=OptimizerConfig(
        learning_rate=4e-3, warmup_steps=PARTS * 15 // 100, final_fraction=0.05
    ),
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
    before = os.getloadavg()[0]
    if options.smoke:
        results, curves = equal_time(small, SMOKE, 0, stream=sys.stderr)
    else:
        results, curves = equal_time(models, CONFIG, options.minutes, stream=sys.stderr)
    results |= {"load_average": [round(before, 2), round(os.getloadavg()[0], 2)]}
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
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains every model for the same time on this machine, on one device.

    Args:
      models: by the names they are reported under.
      config: of every run. Its steps, and those of its schedule, are parts of the time.
      minutes: of training, for each model, without its first step, which compiles; 0: two steps
        each, to see that everything works.
      stream: where progress is shown; nowhere if None.
      clock: seconds, increasing.

    Returns:
      What there is to report, and curves: by model, bits per byte in training, and the tokens and
      seconds of training until then. Nothing is kept on disk.

    Raises:
      UserError: the data cannot be read or do not fit a model, the loss or its gradient was not
        finite, or the optimizer counts its schedule together with its own steps, as adam_atan2
        does.
    """
    data = load_data(config.data.source, config.data.tokenizer, config.data.valid_fraction)
    rows: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, model in models.items():
        rows[name], curves[name] = _train(name, model, config, data, 60 * minutes, stream, clock)
    return {"minutes_of_training": minutes, "models": rows, "data": data.provenance}, curves


def _train(
    name: str,
    model: LanguageModelConfig,
    config: TrainConfig,
    data: Data,
    seconds: float,
    stream: TextIO | None,
    clock: Callable[[], float],
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """What one model comes to in its time, and its curve."""
    check_fits(model, config, data)
    mesh = sharding.build_mesh("data=1")
    steps = build_steps(model, config, mesh)
    batches = Batches(data.train, batch=config.batch, time=config.time, seed=config.seed)
    meter = Meter(model, config, data, mesh.size)
    curve: dict[str, list[float]] = {"tokens": [], "seconds": [], "bits_per_byte": []}
    state, step, spent, begun, worked = steps.init(), 0, 0.0, 0.0, 0.0
    while spent < seconds or step < 2:
        part = int(config.steps * spent / seconds) if seconds else 0
        depth = model.sample_depth(np.random.default_rng((config.seed, step)))
        batch = sharding.put_batch(batches(step), mesh)
        state, metrics = steps.train(_at(state, part), batch, jnp.int32(depth or 0))
        numbers = jax.device_get(metrics)  # waits for the step
        step += 1
        if not numbers.pop("healthy"):
            raise UserError(
                f"{name} stopped at step {step}: loss {numbers['loss']}, norm of the gradient"
                f" {numbers['grad_norm']}, not all finite. Lower optimizer.learning_rate, or use"
                " precision float32."
            )
        if step == 1:
            begun, worked = clock(), time.process_time()
            continue
        lap, spent = spent, clock() - begun
        meter.add(depth, numbers, spent - lap)
        if step % config.log_every == 0 or not spent < seconds:
            line = meter.flush()
            curve["tokens"].append(step * config.batch * config.time)
            curve["seconds"].append(spent)
            curve["bits_per_byte"].append(line["bits_per_byte"])
            if stream is not None:
                print(
                    f"{name}  {spent:.0f} of {seconds:.0f} s  step {step}"
                    f"  {line['bits_per_byte']:.3f} bits/byte"
                    f"  {line['tokens_per_second']:.0f} tokens/s",
                    file=stream,
                    flush=True,
                )
    worked = time.process_time() - worked
    found = evaluate(steps, state["params"], model, config, data, mesh, batches=config.eval_batches)
    row = {
        "parameters": sum(x.size for x in jax.tree.leaves(state["params"])),
        "steps": step,
        "tokens": step * config.batch * config.time,
        "training_seconds": round(spent, 1),
        # Of all threads; where models differ in it, other work took the machine from some of them.
        "processor_seconds": round(worked, 1),
        "bits_per_byte": round(next(iter(found.bits_per_byte.values())), 4),
    }
    return row, curve


def _at(state: State, part: int) -> State:
    """The state of a run whose schedule is at this part of its time.

    Raises:
      UserError: the optimizer has no place in its schedule beside the number of its steps.
    """

    def is_place(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    def moved(x: Any) -> Any:
        return x._replace(count=jnp.asarray(part, x.count.dtype)) if is_place(x) else x

    if not any(map(is_place, jax.tree.leaves(state["opt_state"], is_leaf=is_place))):
        raise UserError(
            "The learning rate of this optimizer follows its steps and cannot follow time, as is"
            " so of adam_atan2. Choose optimizer.name adamw, atan2 or lamb."
        )
    return state | {"opt_state": jax.tree.map(moved, state["opt_state"], is_leaf=is_place)}


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
