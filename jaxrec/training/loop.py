"""One run from start to end, top to bottom: data, state, the loop, and what it leaves behind."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.errors import UserError
from jaxrec.models.protocol import LanguageModelConfig
from jaxrec.training import flops, hosts, monitors, running, sharding
from jaxrec.training.config import TrainConfig
from jaxrec.training.data import Batches, Data, HostBatch, load_data
from jaxrec.training.evaluation import (
    Evaluation,
    build_comparisons,
    evaluate,
    measure,
)
from jaxrec.training.guard import explain_bad_step
from jaxrec.training.running import averaged, due, ended, open_run, run_folder, run_steps
from jaxrec.training.runs import Run
from jaxrec.training.step import build_steps

FINAL = 4
"""So many times the text of an evaluation on the way is read by the one at the end."""

Sample = Callable[[Any, Any], str]  # (model, tokenizer) -> text
Outcome = running.Outcome[Data, Evaluation]


class Settling(NamedTuple):
    """A step that the device may still work on."""

    step: int
    depth: int | None
    metrics: dict[str, jax.Array]
    batch: HostBatch
    watched: dict[str, jax.Array] | None  # by the monitors, after the step


def train(
    model_path: str,
    model_config: LanguageModelConfig,
    config: TrainConfig,
    *,
    runs: Path = Path("runs"),
    resume: bool = False,
    start: Path | None = None,
    sample: Sample | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Trains a model, or goes on with the run that its folder holds.

    Args:
      model_path: how the model is named, for run.json and messages.
      model_config: the architecture.
      config: everything else.
      runs: folder of all runs.
      resume: insist that there is a run to go on with. Without it a run is resumed if there is one.
      start: folder of another run, whose newest parameters a new run begins with; None draws them.
      sample: writes a sample from the model; called every `config.sample_every` steps.
      stream: where progress is shown, such as sys.stdout; nowhere if None.

    Returns:
      The outcome, with the final state. SIGTERM and SIGINT end the run early, after a checkpoint.

    Raises:
      UserError: bad configuration, data or folder; a checkpoint could not be written or read; or
        the loss or its gradient was not finite (the parameters before that step stay in the last
        checkpoint).
    """
    mesh = sharding.build_mesh(config.mesh)  # first: what is refused at once need not wait for text
    sharding.check_batch(config.batch // config.accumulate, config.time, mesh)
    data = load_data(config.data.source, config.data.tokenizer, config.data.valid_fraction)
    check_fits(model_config, config, data)
    folder = run_folder(runs, config.name, model_path)
    run = Run(folder, model_path, model_config, config, data.provenance)
    steps = build_steps(model_config, config, mesh)
    monitor = monitors.build_monitor(
        config.monitor_names,
        model_path,
        functools.partial(monitors.language_model_forward, parts=config.accumulate),
        steps.computing,
        steps.abstract["params"],
        monitors.abstract_batch(config.batch, config.time, mesh),
        mesh,
    )
    compare = build_comparisons(steps, model_config, config, data, mesh)
    batches = Batches(data.train, batch=config.batch, time=config.time, seed=config.seed)
    with open_run(
        run, steps, resume=resume, start=start, tokenizer=data.tokenizer, stream=stream
    ) as now:
        meter = Meter(model_config, config, data, mesh.size)

        def update(step: int, host_batch: HostBatch) -> Settling:
            depth = model_config.sample_depth(np.random.default_rng((config.seed, step)))
            batch = sharding.put_batch(host_batch, mesh)
            now.state, metrics = steps.train(now.state, batch, jnp.int32(depth or 0))
            watched = None
            if monitor is not None and due(step + 1, config.monitor_every):
                watched = monitor(now.state["params"], batch)
            return Settling(step, depth, metrics, host_batch, watched)

        def settle(waiting: Settling) -> None:
            step, depth, metrics, batch, watched = waiting
            numbers = jax.device_get(metrics)
            if not numbers.pop("healthy"):
                now.checkpoints.wait()
                good = now.checkpoints.latest_step()
                raise UserError(
                    explain_bad_step(run, steps, now.state, step, depth, batch, numbers, good)
                )
            meter.add(depth, numbers, now.watch.lap())
            if watched is not None:
                now.log.log(step + 1, monitors.summary(watched), kind="monitor")
            if due(step + 1, config.log_every) or step + 1 == config.steps:
                line = meter.flush()
                now.log.log(step + 1, line)
                shown = ("loss", "bits_per_byte", "tokens_per_second")
                now.progress.update(step + 1, **{name: line[name] for name in shown})

        def evaluation(step: int, batches: int) -> Evaluation:
            params = averaged(now.state)
            result = evaluate(steps, params, model_config, config, data, mesh, batches=batches)
            if measures := measure(steps, params, config, data, mesh):
                now.log.log(step, measures, kind="model")
            if compared := compare(params):
                now.log.log(step, compared, kind="monitor")
            now.log.log(step, dataclasses.asdict(result), kind="valid")
            now.progress.note(f"step {step}  validation bits/byte  {result}")
            return result

        def write_sample(step: int) -> None:
            assert sample is not None
            model = steps.merge(sharding.on_one_device(averaged(now.state), mesh))
            text = sample(model, data.tokenizer)
            with (run.folder / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {step}\n{text}\n")
            now.progress.note(f"step {step}  sample: {text}")

        step = run_steps(
            now,
            batches,
            rows=sharding.host_rows(config.batch, mesh),
            update=update,
            settle=settle,
            evaluate=lambda step: evaluation(step, config.eval_batches),
            sample=None if sample is None or hosts.several() else write_sample,
            sample_every=config.sample_every,
        )
        return ended(
            now,
            step,
            data=data,
            evaluate=lambda step: evaluation(step, FINAL * config.eval_batches),
            merge=steps.merge,
            mesh=mesh,
        )


def check_fits(model_config: LanguageModelConfig, config: TrainConfig, data: Data) -> None:
    """Checks that model, text and sizes belong together.

    Raises:
      UserError: the tokenizer has more tokens than the model, or the sequences are longer than its
        context.
    """
    if data.tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"The tokenizer {data.tokenizer.name} has {data.tokenizer.vocab_size} tokens, the model"
            f" {model_config.vocab_size}."
            f" Use --model.vocab-size {data.tokenizer.vocab_size} or more."
        )
    if config.time > model_config.context:
        raise UserError(
            f"time is {config.time} and the model's context {model_config.context}."
            f" Shorten time, or use --model.context {config.time}."
        )


class Meter:
    """Turns the metrics of steps into lines: bits per byte, speed, model FLOPs utilisation."""

    def __init__(
        self, model_config: LanguageModelConfig, config: TrainConfig, data: Data, devices: int
    ):
        self._model_config, self._config = model_config, config
        labels = len(data.train.tokens) - len(data.train.starts)
        self._bits_per_nat = labels / data.train.num_bytes / np.log(2)
        self._peak = flops.peak_flops(jax.devices()[0]) * devices
        self._lines: list[dict[str, float]] = []
        self._sums = np.zeros(3)  # tokens, floating-point operations, seconds

    def add(self, depth: int | None, numbers: dict[str, Any], seconds: float) -> None:
        """Notes one step of that depth; `numbers` are the metrics of the compiled step."""
        config = self._config
        tokens = config.batch * config.time
        work = tokens * self._model_config.flops_per_token(config.time, depth, training=True)
        line = {name: float(value) for name, value in numbers.items()}
        line["bits_per_byte"] = line["loss"] * self._bits_per_nat
        if depth is not None:
            line["depth"] = depth
        self._lines.append(line)
        self._sums += tokens, work, seconds

    def flush(self) -> dict[str, float]:
        """The mean of the lines since the last call, and the speed over all of them."""
        lines, self._lines = self._lines, []
        (tokens, work, seconds), self._sums = self._sums, np.zeros(3)
        means = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
        return means | {
            "tokens_per_second": float(tokens / seconds),
            "mfu": float(work / seconds / self._peak),
        }
