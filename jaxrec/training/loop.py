"""One run from start to end, top to bottom: data, state, the loop, and what it leaves behind."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import to_dict
from jaxrec.errors import UserError
from jaxrec.models.protocol import LanguageModelConfig
from jaxrec.training import flops, sharding
from jaxrec.training.checkpoint import Checkpoints
from jaxrec.training.config import TrainConfig
from jaxrec.training.data import Batches, Data, HostBatch, load_data, prefetch
from jaxrec.training.evaluation import Evaluation, evaluate, measure
from jaxrec.training.guard import explain_bad_step
from jaxrec.training.metrics import MetricsLog, truncate_after
from jaxrec.training.progress import RunProgress
from jaxrec.training.runs import Run, check_same_run, read_run
from jaxrec.training.step import Steps, build_steps

FINAL = 4
"""So many times the text of an evaluation on the way is read by the one at the end."""

Sample = Callable[[Any, Any], str]  # (model, tokenizer) -> text
# Step, depth, metrics and batch of a step that the device may still work on.
Settling = tuple[int, int | None, dict[str, jax.Array], HostBatch]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Run
    state: dict[str, Any]
    step: int  # updates made
    stopped_by: str | None  # name of the signal that ended it early, or None
    data: Data
    evaluation: Evaluation | None  # of the final state; None if the run was stopped early
    model: Any  # with the final parameters, or their running average if there is one


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
    data = load_data(config.data.source, config.data.tokenizer, config.data.valid_fraction)
    check_fits(model_config, config, data)
    mesh = sharding.build_mesh(config.mesh)
    sharding.check_batch(config.batch // config.accumulate, config.time, mesh)
    name = config.name or model_path.rpartition(".")[2].replace(":", "-").lower()
    run = Run(runs / name, model_path, model_config, config, data.provenance)
    steps = build_steps(model_config, config, mesh)
    batches = Batches(data.train, batch=config.batch, time=config.time, seed=config.seed)
    old = read_run(run.folder) if (run.folder / "run.json").exists() else None
    if old is not None:
        check_same_run(old, run)
    elif resume:
        raise UserError(f"--resume: there is no run {run.folder}. Leave --resume out to begin.")

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, keep=config.keep))
        first = checkpoints.latest_step()
        if resume and first is None:
            raise UserError(
                f"--resume: {run.folder} holds no checkpoint. Leave --resume out to begin."
            )
        if first is not None and first > config.steps:
            raise UserError(
                f"{run.folder} has made {first} steps already; --steps {config.steps} is less."
                " Ask for more, or choose another --name."
            )
        if first is not None:
            state = checkpoints.restore(first, steps.abstract)
        else:
            state = steps.init() if start is None else begin_with(start, steps)
        first = first or 0
        run.write(data.tokenizer)
        truncate_after(run.folder / "metrics.jsonl", first)
        log = stack.enter_context(
            MetricsLog(
                run.folder,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                config=to_dict(config) | {"model": to_dict(model_config)},
            )
        )
        stopped = stack.enter_context(stop_signals())
        coming = stack.enter_context(
            contextlib.closing(
                prefetch(batches, first, config.steps, sharding.host_rows(config.batch))
            )
        )
        stream = stream or stack.enter_context(open(os.devnull, "w"))
        progress = stack.enter_context(RunProgress(config.steps, start=first, stream=stream))
        if first:
            progress.note(f"Going on from step {first} of {run.folder}.")
            if old and old.config.steps != config.steps and config.optimizer.schedule != "constant":
                progress.note(
                    f"The learning rate follows a run of {config.steps} steps from here on;"
                    f" so far it followed one of {old.config.steps}."
                )
        meter = Meter(model_config, config, data, mesh.size)

        def settle(waiting: Settling, state: dict[str, Any]) -> None:
            """Waits for a step's metrics and reports them, or stops the run."""
            step, depth, metrics, batch = waiting
            numbers = jax.device_get(metrics)
            if not numbers.pop("healthy"):
                checkpoints.wait()
                good = checkpoints.latest_step()
                raise UserError(
                    explain_bad_step(run, steps, state, step, depth, batch, numbers, good)
                )
            meter.add(depth, numbers)
            if due(step + 1, config.log_every) or step + 1 == config.steps:
                line = meter.flush()
                log.log(step + 1, line)
                shown = ("loss", "bits_per_byte", "tokens_per_second")
                progress.update(step + 1, **{name: line[name] for name in shown})

        def evaluation(step: int, batches: int) -> Evaluation:
            params = state["params"] if state["ema"] is None else state["ema"]
            result = evaluate(steps, params, model_config, config, data, mesh, batches=batches)
            if measures := measure(steps, params, config, data, mesh):
                log.log(step, measures, kind="model")
            log.log(step, dataclasses.asdict(result), kind="valid")
            progress.note(f"step {step}  validation bits/byte  {result}")
            return result

        step, waiting = first, None
        for step, host_batch in coming:
            depth = model_config.sample_depth(np.random.default_rng((config.seed, step)))
            batch = sharding.put_batch(host_batch, mesh)
            state, metrics = steps.train(state, batch, jnp.int32(depth or 0))
            # The host looks at a step while the device already works on the next.
            if waiting is not None:
                settle(waiting, state)
            waiting, step = (step, depth, metrics, host_batch), step + 1
            stop = bool(stopped)  # looked at once: a signal may arrive at any line below
            last = step == config.steps or stop
            evaluates = due(step, config.eval_every) and not last
            samples = sample is not None and due(step, config.sample_every) and not last
            saves = last or due(step, config.save_every)
            if evaluates or samples or saves:
                settle(waiting, state)
                waiting = None
            if evaluates:
                evaluation(step, config.eval_batches)
            if sample is not None and samples:
                model = steps.merge(sharding.on_one_device(state["params"], mesh))
                text = sample(model, data.tokenizer)
                with (run.folder / "samples.txt").open("a", encoding="utf-8") as file:
                    file.write(f"--- step {step}\n{text}\n")
                progress.note(f"step {step}  sample: {text}")
            if saves:
                checkpoints.save(step, state, {"model": model_path})
            if evaluates or samples or saves:
                meter.restart()  # so that tokens per second count training only
            if stop:
                break
        checkpoints.wait()
        done = step >= config.steps
        final = state["params"] if state["ema"] is None else state["ema"]
        return Outcome(
            run,
            state,
            step,
            stopped_by=None if done else stopped[0],
            data=data,
            evaluation=evaluation(step, FINAL * config.eval_batches) if done else None,
            model=steps.merge(sharding.on_one_device(final, mesh)),
        )


def begin_with(folder: Path, steps: Steps) -> dict[str, Any]:
    """The state before the first update, with the newest parameters of another run.

    Raises:
      UserError: the folder is no run, holds no checkpoint, or one of another model.
    """
    with Checkpoints(read_run(folder).checkpoints, keep=None, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{folder} has no checkpoint to begin with.")
        params = checkpoints.restore_params(step, steps.abstract["params"])
    state = steps.init()
    average = None if state["ema"] is None else jax.tree.map(jnp.copy, params)
    return state | {"params": params, "ema": average}


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
        self.restart()

    def restart(self) -> None:
        """Begins to measure time anew."""
        self._begun = time.perf_counter()

    def add(self, depth: int | None, numbers: dict[str, Any]) -> None:
        """Notes one step of that depth; `numbers` are the metrics of the compiled step."""
        now = time.perf_counter()
        seconds, self._begun = now - self._begun, now
        config = self._config
        tokens = config.batch * config.time
        work = tokens * self._model_config.flops_per_token(config.time, depth, training=True)
        line = {name: float(value) for name, value in numbers.items()}
        line["bits_per_byte"] = line["loss"] * self._bits_per_nat
        line["tokens_per_second"] = tokens / seconds
        line["mfu"] = work / seconds / self._peak
        if depth is not None:
            line["depth"] = depth
        self._lines.append(line)

    def flush(self) -> dict[str, float]:
        """The mean of the lines since the last call."""
        lines, self._lines = self._lines, []
        return {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects the names of SIGTERM and SIGINT instead of dying; the second one acts as usual."""
    received: list[str] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, _: Any) -> None:
        received.append(signal.Signals(number).name)
        for kind in kinds:
            signal.signal(kind, before[kind])

    try:
        for kind in kinds:
            signal.signal(kind, note)
        yield received
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
