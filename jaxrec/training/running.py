"""What every run does around its steps: its folder, going on where it was stopped, saving, and
stopping when it is told to.
"""

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TextIO, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxrec.config import to_dict
from jaxrec.errors import UserError
from jaxrec.training import hosts, monitors, sharding
from jaxrec.training.checkpoint import Checkpoints, Restored
from jaxrec.training.data import Tokenizer, prefetch
from jaxrec.training.lock import locked
from jaxrec.training.metrics import MetricsLog, truncate_after
from jaxrec.training.progress import RunProgress
from jaxrec.training.runs import Run, check_same_run, read_run, versions

State = dict[str, Any]
Batch = TypeVar("Batch")
Waiting = TypeVar("Waiting")
Data = TypeVar("Data")
Scores = TypeVar("Scores")


class Steps(Protocol):
    """What a run asks of its compiled functions."""

    @property
    def init(self) -> Callable[[], State]:
        """Gives the state before the first update."""
        ...

    @property
    def abstract(self) -> State:
        """Shapes, dtypes and shardings of the state."""
        ...


class Stopwatch:
    """Seconds from step to step, without the pauses for what is no training."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Ends a pause."""
        self._begun = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the last pause."""
        begun, self._begun = self._begun, time.perf_counter()
        return self._begun - begun


@dataclasses.dataclass
class Running:
    """A run that is under way."""

    run: Run
    first: int  # updates made before it began, or went on
    state: State
    checkpoints: Checkpoints
    log: MetricsLog
    progress: RunProgress
    stopped: list[str]  # names of the signals that came
    watch: Stopwatch


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[Data, Scores]):
    """How a run ended."""

    run: Run
    state: State
    step: int  # updates made
    stopped_by: str | None  # name of the signal that ended it early, or None
    data: Data
    evaluation: Scores | None  # of the final state; None if the run was stopped early
    # With the final parameters, or their running average if there is one; None on several hosts,
    # of which none may have room for it.
    model: Any


class Settling(NamedTuple):
    """A step that the device may still work on."""

    step: int  # updates made after it
    metrics: dict[str, Array]
    watched: dict[str, Array] | None  # by the monitors, after the step


def run_folder(runs: Path, name: str | None, model_path: str) -> Path:
    """The folder of a run: its name below that of all runs, or one made from the model's."""
    return runs / (name or model_path.rpartition(".")[2].replace(":", "-").lower())


@contextlib.contextmanager
def open_run(
    run: Run,
    steps: Steps,
    *,
    resume: bool = False,
    start: Path | None = None,
    tokenizer: Tokenizer | None = None,
    stream: TextIO | None = None,
) -> Iterator[Running]:
    """Begins a run, or goes on with the one that its folder holds.

    Args:
      run: what is to be in run.json.
      steps: its compiled functions.
      resume: insist that there is a run to go on with.
      start: folder of another run, whose newest parameters a new run begins with.
      tokenizer: copied into the folder, if text is read.
      stream: where progress is shown; nowhere if None.

    Raises:
      UserError: the folder holds another run or none to go on with, another process writes into it,
        or a checkpoint could not be read or written.
    """
    config = run.config
    hosts.check_same("a model", to_dict(run.model_config))
    hosts.check_same("options", to_dict(config))
    hosts.check_same("data", run.data)
    with contextlib.ExitStack() as stack:
        notes: list[str] = []
        hosts.first_does(lambda: notes.extend(_take_folder(stack, run, resume)))
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, keep=config.keep))
        newest = checkpoints.latest_step()
        if resume and newest is None:
            raise UserError(
                f"--resume: {run.folder} holds no checkpoint. Leave --resume out to begin."
            )
        if newest is not None and newest > config.steps:
            raise UserError(
                f"{run.folder} has made {newest} steps already; --steps {config.steps} is less."
                " Ask for more, or choose another --name."
            )
        restored = checkpoints.restore_newest(steps.abstract)
        if restored is None:
            state = steps.init() if start is None else begin_with(start, steps)
            restored = Restored(0, state, ())
        first, state, damaged = restored

        def begin() -> None:
            run.write(tokenizer)
            truncate_after(run.folder / "metrics.jsonl", first)

        hosts.first_does(begin)
        log = stack.enter_context(
            MetricsLog(
                run.folder,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                config=to_dict(config) | {"model": to_dict(run.model_config)},
                write=hosts.is_first(),
            )
        )
        stopped: list[str] = []
        stack.enter_context(hosts.stop_signals() if hosts.several() else stop_signals(stopped))
        if stream is None or not hosts.is_first():
            stream = stack.enter_context(open(os.devnull, "w"))
        progress = stack.enter_context(RunProgress(config.steps, start=first, stream=stream))
        if first:
            notes = [*damaged, f"Going on from step {first} of {run.folder}.", *notes]
        for note in notes:
            progress.note(note)
        yield Running(run, first, state, checkpoints, log, progress, stopped, Stopwatch())


def _take_folder(stack: contextlib.ExitStack, run: Run, resume: bool) -> list[str]:
    """Locks the folder of a run and checks that it is this run's; returns what is to be said."""
    file = run.folder / "run.json"
    if resume and not file.exists():
        raise UserError(f"--resume: there is no run {run.folder}. Leave --resume out to begin.")
    unlocked = stack.enter_context(locked(run.folder))
    notes = [] if unlocked is None else [unlocked]
    if file.exists():
        old = read_run(run.folder)
        check_same_run(old, run)
        steps = run.config.steps
        if old.config.steps != steps and run.config.optimizer.schedule != "constant":
            notes.append(
                f"The learning rate follows a run of {steps} steps from here on;"
                f" so far it followed one of {old.config.steps}."
            )
    return notes


def begin_with(folder: Path, steps: Steps) -> State:
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


def run_steps(
    running: Running,
    batches: Callable[[int, Any], Batch],
    *,
    rows: slice,
    update: Callable[[int, Batch], Waiting],
    settle: Callable[[Waiting], None],
    evaluate: Callable[[int], object],
    sample: Callable[[int], None] | None = None,
    sample_every: int = 0,
) -> int:
    """Makes the steps that are left, and saves, evaluates and samples between them.

    The host looks at what a step gave while the device already works on the next.

    Args:
      running: the run; its state is what is saved.
      batches: (step, rows) -> these rows of the batch of a step, on the host.
      rows: those that this process needs.
      update: (step, batch) -> what `settle` waits for; begins a step and puts its result into
        `running.state`.
      settle: waits for a step and reports it, or stops the run. No state is saved, and nothing is
        done with it, before its step has been settled.
      evaluate: told the updates made.
      sample: likewise.
      sample_every: steps between two samples, 0: none.

    Returns:
      The updates made, fewer than wanted after a signal.

    Raises:
      UserError: a checkpoint could not be written.
    """
    run, config = running.run, running.run.config
    step, waiting = running.first, None
    ahead = prefetch(batches, step, config.steps, rows, limit=config.batch_limit)
    with contextlib.closing(ahead) as coming:
        for step, host_batch in coming:
            begun = update(step, host_batch)
            if waiting is not None:
                settle(waiting)
            waiting, step = begun, step + 1
            if hosts.several() and hosts.stop_at(step):
                running.stopped.append(signal.SIGTERM.name)
            stop = bool(running.stopped)  # looked at once: a signal may arrive at any line below
            last = step == config.steps or stop
            evaluates = due(step, config.eval_every) and not last
            samples = sample is not None and due(step, sample_every) and not last
            saves = last or due(step, config.save_every)
            if evaluates or samples or saves:
                settle(waiting)
                waiting = None
            if evaluates:
                evaluate(step)
            if sample is not None and samples:
                sample(step)
            if saves:
                running.checkpoints.save(step, running.state, {"model": run.model_path})
            if evaluates or samples or saves:
                running.watch.restart()
            if stop:
                break
    running.checkpoints.wait()
    return step


def updating(
    running: Running,
    train: Callable[[State, Any], tuple[State, dict[str, Array]]],
    monitor: Callable[[Any, Any], dict[str, Array]] | None,
    put: Callable[[Any], Any],
) -> Callable[[int, Any], Settling]:
    """The `update` of `run_steps` for steps that are a function of the state and a batch.

    Args:
      running: the run.
      train: (state, batch) -> the next state and metrics; consumes the state.
      monitor: (params, batch) -> what is watched every `monitor_every` steps, or None.
      put: a batch on the host -> the same on the mesh.
    """

    def update(step: int, host_batch: Any) -> Settling:
        batch = put(host_batch)
        running.state, metrics = train(running.state, batch)
        watched = None
        if monitor is not None and due(step + 1, running.run.config.monitor_every):
            watched = monitor(running.state["params"], batch)
        return Settling(step + 1, metrics, watched)

    return update


def settling(
    running: Running,
    means: Callable[[list[dict[str, float]]], dict[str, float]],
    shown: Callable[[dict[str, float]], dict[str, Any]],
) -> Callable[[Settling], None]:
    """The `settle` of `run_steps` that goes with `updating`: logs a line every `log_every` steps.

    Args:
      running: the run.
      means: metrics of each step since the last line, and its seconds -> the line.
      shown: line -> what progress shows of it.
    """
    config, since = running.run.config, []

    def settle(waiting: Settling) -> None:
        step = waiting.step
        since.append(_settled(running, waiting) | {"seconds": running.watch.lap()})
        if waiting.watched is not None:
            running.log.log(step, monitors.summary(waiting.watched), kind="monitor")
        if due(step, config.log_every) or step == config.steps:
            line = means(since)
            since.clear()
            running.log.log(step, line)
            running.progress.update(step, **shown(line))

    return settle


def _settled(running: Running, waiting: Settling) -> dict[str, float]:
    """Waits for a step and gives its metrics, all but `healthy`.

    Raises:
      UserError: the loss or a parameter was not finite; it says which checkpoint is good.
    """
    step, metrics, _ = waiting
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not numbers.pop("healthy"):
        running.checkpoints.wait()
        good = running.checkpoints.latest_step()
        kept = "no checkpoint was written yet" if good is None else f"checkpoint {good} is good"
        raise UserError(
            f"Stopped at step {step}: loss {numbers['loss']}, and not all parameters are finite;"
            f" {kept}. Lower optimizer.learning_rate, or use precision float32."
        )
    return numbers


def ended(
    running: Running,
    step: int,
    *,
    data: Data,
    evaluate: Callable[[int], Scores],
    merge: Callable[[Any], Any],
    mesh: Mesh,
) -> Outcome[Data, Scores]:
    """How a run ended that `run_steps` has brought to this step.

    Args:
      running: the run.
      step: updates made.
      data: what it read.
      evaluate: told the updates made; called if they are all that were wanted.
      merge: parameters -> model.
      mesh: where they are.
    """
    done = step >= running.run.config.steps
    evaluation = evaluate(step) if done else None
    here = None if hosts.several() else sharding.on_one_device(averaged(running.state), mesh)
    return Outcome(
        running.run,
        running.state,
        step,
        stopped_by=None if done else running.stopped[0],
        data=data,
        evaluation=evaluation,
        model=None if here is None else merge(here),
    )


def write_scores(outcome: Outcome[Any, Any]) -> dict[str, Any]:
    """Writes report.json: the scores of the end, data and versions."""
    assert outcome.evaluation is not None, "a run that was stopped has nothing to report"
    report = {
        "steps": outcome.step,
        **dataclasses.asdict(outcome.evaluation),
        "data": outcome.run.data,
        "versions": versions(),
    }
    (outcome.run.folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def averaged(state: State) -> Any:
    """The running average of the parameters, or the parameters if there is none."""
    return state["params"] if state["ema"] is None else state["ema"]


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


@contextlib.contextmanager
def stop_signals(received: list[str]) -> Iterator[None]:
    """Collects the names of SIGTERM and SIGINT instead of dying; the second one acts as usual.

    Only Python's main thread can do that; in another one nothing is collected.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, _: Any) -> None:
        received.append(signal.Signals(number).name)
        for kind in kinds:
            signal.signal(kind, before[kind])

    try:
        for kind in kinds:
            signal.signal(kind, note)
        yield
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
