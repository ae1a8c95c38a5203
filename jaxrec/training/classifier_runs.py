"""Training a classifier of sequences in a run folder, over a mesh, and scoring it.

Every epoch reads the examples in another order; what it leaves over after its last whole batch is
not used. Everything random is a function of the seed and the step, so that a run that was stopped
goes on as if it had not been.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.errors import UserError
from jaxrec.models.sequence_classifier import SequenceClassifierConfig
from jaxrec.training import monitors, optim, running, sharding
from jaxrec.training.classification import check_examples, numbers, optimizer_for
from jaxrec.training.config import ClassifierConfig
from jaxrec.training.data.examples import NAMES, Examples, LabelledData, load_examples
from jaxrec.training.running import (
    State,
    averaged,
    ended,
    open_run,
    run_folder,
    run_steps,
    settling,
    updating,
)
from jaxrec.training.runs import Run, read_run, trained_model
from jaxrec.training.sharding import OnMesh
from jaxrec.training.step import cast_matrices, is_matrix, step_key


@dataclasses.dataclass(frozen=True)
class ClassifierScores:
    """How held-out examples were classified."""

    accuracy: float  # share whose label has the largest logit
    loss: float  # mean cross entropy, nats
    examples: int

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} right, loss {self.loss:.4f}"


class ClassifierSteps(NamedTuple):
    """One run's compiled functions."""

    init: Callable[[], State]
    train: Callable[[State, Examples], tuple[State, dict[str, Array]]]  # consumes the state
    # (params, examples, weights, factor on every time step) -> summed nats, sum of those right
    evaluate: Callable[[Any, Examples, Array, Array], tuple[Array, Array]]
    abstract: State  # shapes, dtypes and shardings of the state
    measure: Callable[[Any], dict[str, Array]]  # params -> `decay_measures` of the model
    merge: Callable[[Any], Any]  # params -> model
    computing: Callable[[Any], Any]  # params -> model in the dtypes in which it computes


Outcome = running.Outcome[LabelledData, ClassifierScores]


def build_classifier_steps(
    model_config: SequenceClassifierConfig, config: ClassifierConfig, mesh: Mesh
) -> ClassifierSteps:
    """Prepares a run; nothing is computed or allocated before the first call.

    Raises:
      UserError: a parameter or the batch does not divide over the mesh.
    """
    sharding.check_batch(config.batch, mesh.shape["seq"], mesh)
    abstract_model = nnx.eval_shape(lambda: model_config.build(rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(abstract_model)
    matrices, dtype = is_matrix(abstract_model), jnp.dtype(config.precision)
    optimizer = optimizer_for(nnx.to_pure_dict(variables), config, config.steps)
    rate, decay = optim.schedule(config.optimizer, config.steps), config.optimizer.ema_decay

    def merge(params: Any) -> Any:
        return nnx.merge(graph, params)

    def computing(params: Any) -> Any:
        return merge(cast_matrices(params, matrices, dtype))

    def losses(params: Any, batch: Examples, **options: Any) -> tuple[Array, Array]:
        """Nats and whether it is right, of every example."""
        logits = computing(params)(numbers(batch.inputs), batch.lengths, **options)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return nats, (jnp.argmax(logits, axis=-1) == batch.labels).astype(jnp.float32)

    def init() -> State:
        params = nnx.to_pure_dict(nnx.split(model_config.build(rngs=nnx.Rngs(config.seed)))[1])
        return {
            "params": params,
            "opt_state": optimizer.init(params),
            "ema": None if decay is None else jax.tree.map(jnp.copy, params),
            "step": jnp.zeros((), jnp.int32),
        }

    def train(state: State, batch: Examples) -> tuple[State, dict[str, Array]]:
        step, key = state["step"], step_key(config.seed, state["step"])

        def loss(params: Any) -> tuple[Array, Array]:
            nats, right = losses(params, batch, key=key, remat=config.remat)
            return jnp.mean(nats), jnp.mean(right)

        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = state["ema"]
        if decay is not None:
            ema = optim.ema_update(ema, params, decay)
        new = {"params": params, "opt_state": opt_state, "ema": ema, "step": step + 1}
        metrics = {"loss": value, "accuracy": right, "learning_rate": rate(step)}
        return new, metrics | {"healthy": optim.all_finite((value, params))}

    def evaluate(
        params: Any, batch: Examples, weights: Array, step_rescale: Array
    ) -> tuple[Array, Array]:
        nats, right = losses(params, batch, step_rescale=step_rescale)
        return jnp.sum(weights * nats), jnp.sum(weights * right)

    abstract, places = sharding.placed(jax.eval_shape(init), abstract_model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return ClassifierSteps(
        init=OnMesh(jax.jit(init, out_shardings=places), mesh),
        train=OnMesh(jax.jit(train, donate_argnums=0, out_shardings=(places, everywhere)), mesh),
        evaluate=OnMesh(jax.jit(evaluate, out_shardings=everywhere), mesh),
        abstract=abstract,
        measure=OnMesh(
            jax.jit(lambda params: merge(params).decay_measures(), out_shardings=everywhere), mesh
        ),
        merge=merge,
        computing=computing,
    )


def train_classifier_run(
    model_path: str,
    model_config: SequenceClassifierConfig,
    config: ClassifierConfig,
    *,
    runs: Path = Path("runs"),
    resume: bool = False,
    start: Path | None = None,
    stream: TextIO | None = None,
) -> Outcome:
    """Trains a classifier, or goes on with the run that its folder holds.

    Args:
      model_path: how the model is named, for run.json and messages.
      model_config: the architecture; its inputs and classes must be those of the examples.
      config: everything else.
      runs: folder of all runs.
      resume: insist that there is a run to go on with. Without it a run is resumed if there is one.
      start: folder of another run, whose newest parameters a new run begins with; None draws them.
      stream: where progress is shown, such as sys.stdout; nowhere if None.

    Returns:
      The outcome, with the final state. SIGTERM and SIGINT end the run early, after a checkpoint.

    Raises:
      UserError: bad configuration, examples or folder; a checkpoint could not be written or read;
        or the loss or a parameter was not finite (the state before stays in the last checkpoint).
    """
    mesh = sharding.build_mesh(config.mesh)
    data = load_examples(config.data)
    check_fits(model_config, config, data)
    run = Run(
        run_folder(runs, config.name, model_path), model_path, model_config, config, data.provenance
    )
    steps = build_classifier_steps(model_config, config, mesh)
    monitor = monitors.build_monitor(
        config.monitor_names,
        model_path,
        lambda model, batch: model(numbers(batch.inputs), batch.lengths),
        steps.computing,
        steps.abstract["params"],
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, data.train.rows(slice(config.batch)))),
        mesh,
    )

    def batches(step: int, rows: slice) -> Examples:
        return batch_of(data.train, config, step, rows)

    with open_run(run, steps, resume=resume, start=start, stream=stream) as now:

        def evaluation(step: int) -> ClassifierScores:
            params = averaged(now.state)
            scores = score(steps, params, data.valid, config.batch, mesh)
            if measures := jax.device_get(steps.measure(params)):
                now.log.log(step, measures, kind="model")
                if measures["unstable"]:
                    now.progress.note(
                        f"step {step}  warning: |a| = {measures['largest_decay']:.6g} > 1, states"
                        " grow without bound"
                    )
            now.log.log(step, dataclasses.asdict(scores), kind="valid")
            now.progress.note(f"step {step}  held out: {scores}")
            return scores

        step = run_steps(
            now,
            batches,
            rows=sharding.host_rows(config.batch, mesh),
            update=updating(now, steps.train, monitor, lambda rows: sharding.put_rows(rows, mesh)),
            settle=settling(now, functools.partial(_means, batch=config.batch), _shown),
            evaluate=evaluation,
        )
        return ended(now, step, data=data, evaluate=evaluation, merge=steps.merge, mesh=mesh)


def _means(steps: list[dict[str, float]], batch: int) -> dict[str, float]:
    """Means over steps, and how many examples were read in a second."""
    line = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return line | {"examples_per_second": batch / line.pop("seconds")}


def _shown(line: dict[str, float]) -> dict[str, float]:
    return {name: line[name] for name in ("loss", "accuracy", "examples_per_second")}


def batch_of(examples: Examples, config: ClassifierConfig, step: int, rows: slice) -> Examples:
    """Rows of the batch of a step of training: a function of the seed and the step alone."""
    count = len(examples.labels)
    epoch, within = divmod(step, count // config.batch)
    order = np.random.default_rng((config.seed, epoch)).permutation(count)
    return examples.rows(order[within * config.batch : (within + 1) * config.batch][rows])


def evaluate_classifier_run(
    folder: Path,
    *,
    source: str | None = None,
    rate: float | None = None,
    batches: int | None = None,
    step: int | None = None,
    ema: bool = False,
) -> tuple[ClassifierScores, int]:
    """Scores a trained classifier on one device.

    Args:
      folder: the run.
      source: other examples; the run's if None. Those that are held out are classified.
      rate: samples per pixel of the digits; the run's if None, or 1 if the source is another file.
        A mixer whose parameters are those of a system in continuous time has its steps scaled by
        what this differs from the run's.
      batches: how many batches, the first ones; all if None.
      step: which checkpoint; the newest if None.
      ema: the running average instead of the parameters.

    Returns:
      The scores and the step that was scored.

    Raises:
      UserError: the run, checkpoint or examples cannot be read, or do not fit each other.
    """
    run = read_run(folder)
    if not isinstance(run.config, ClassifierConfig):
        raise UserError(f"{folder} is not the run of a classifier of sequences.")
    trained = run.config.data
    if rate is None:
        rate = trained.rate if source is None or source in NAMES else 1.0
    config = dataclasses.replace(trained, source=source or trained.source, rate=rate)
    data = load_examples(config)
    check_fits(run.model_config, run.config, data)
    model, step = trained_model(run, step=step, ema=ema)
    mesh = sharding.build_mesh("data=1")
    steps = build_classifier_steps(run.model_config, run.config, mesh)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    scores = score(
        steps,
        params,
        data.valid if batches is None else data.valid.rows(slice(batches * run.config.batch)),
        run.config.batch,
        mesh,
        step_rescale=trained.rate / config.rate if run.model_config.has_time_steps else 1.0,
    )
    return scores, step


def score(
    steps: ClassifierSteps,
    params: Any,
    examples: Examples,
    batch: int,
    mesh: Mesh,
    *,
    step_rescale: float = 1.0,
) -> ClassifierScores:
    """Classifies examples, in batches that the last ones fill up.

    Args:
      steps: the run's compiled functions.
      params: parameters, on the mesh.
      examples: at least one.
      batch: of the run.
      mesh: where batches go.
      step_rescale: factor on every time step.
    """
    count = len(examples.labels)
    nats = right = 0.0
    for begin in range(0, count, batch):
        places = (begin + np.arange(batch))[sharding.host_rows(batch, mesh)]
        weights = (places < count).astype(np.float32)
        host_batch = examples.rows(np.minimum(places, count - 1))
        batch_here, weights = sharding.put_rows((host_batch, weights), mesh)
        found = steps.evaluate(params, batch_here, weights, jnp.float32(step_rescale))
        nats, right = nats + float(found[0]), right + float(found[1])
    return ClassifierScores(right / count, nats / count, count)


def check_fits(
    model_config: SequenceClassifierConfig, config: ClassifierConfig, data: LabelledData
) -> None:
    """Checks that model, batch and examples belong together.

    Raises:
      UserError: they do not.
    """
    source = data.provenance["source"]
    for side, examples in (("training", data.train), ("held-out", data.valid)):
        try:
            check_examples(f"{source}, {side} examples", examples, model_config)
        except ValueError as error:
            raise UserError(
                f"{error} Choose other --data, or another --model.inputs or --model.classes."
            ) from error
    if len(data.train.labels) < config.batch:
        raise UserError(
            f"A batch of {config.batch} needs as many examples of training, got"
            f" {len(data.train.labels)}. Choose a smaller --batch."
        )
