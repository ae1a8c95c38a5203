"""Training a language model on a made task: sequences in which some positions ask for a token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxrec.models.protocol import loop_inputs, training_call
from jaxrec.training import optim
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.losses import cross_entropy
from jaxrec.training.runs import versions
from jaxrec.training.sharding import stacked_axes


class TaskResults(NamedTuple):
    """What came out of a run."""

    model: Any  # the trained model
    losses: np.ndarray  # float32 (steps), nats


def train_task(
    config: Any,
    batch: Callable[[int], dict[str, np.ndarray]],
    *,
    steps: int,
    optimizer: OptimizerConfig,
    seed: int = 0,
) -> TaskResults:
    """Trains a freshly built model; a looped one at a depth and from a latent state that are drawn
    anew in every step.

    Args:
      config: of a language model.
      batch: step -> inputs and labels (b t), where a label is a token or IGNORED, and any further
        arguments of the model, such as `prefix`. Always of the same shapes.
      steps: number of updates, >= 1.
      optimizer: and its schedule.
      seed: of the parameters, depths, latent states, and whatever else a model draws in training.

    Raises:
      ValueError: there is no step to make.
    """
    if steps < 1:
        raise ValueError(f"train_task: steps must be >= 1, got {steps}.")
    model = jax.jit(lambda key: config.build(rngs=nnx.Rngs(key)))(jax.random.key(seed))
    graph, variables = nnx.split(model)
    params = nnx.to_pure_dict(variables)
    transform = optim.build(optimizer, steps, params, stacked_axes(model))

    @jax.jit
    def step(
        params: Any, moments: Any, batch: dict[str, Array], depth: Array, index: Array
    ) -> tuple[Any, Any, Array]:
        key = jax.random.fold_in(jax.random.key(seed), index)

        def loss(params: Any) -> Array:
            options = batch | loop_inputs(config, depth, key)
            inputs, labels = options.pop("inputs"), options.pop("labels")
            model = nnx.merge(graph, params)
            logits, penalty = training_call(model, inputs, key, options)
            return cross_entropy(logits, labels, penalty)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = transform.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = jax.jit(transform.init)(params), []
    for i in range(steps):
        depth = jnp.int32(config.sample_depth(np.random.default_rng((seed, i))) or 0)
        params, moments, value = step(params, moments, batch(i), depth, jnp.int32(i))
        losses.append(value)
    return TaskResults(nnx.merge(graph, params), np.array(losses))


def task_predictions(
    model: Any,
    batch: dict[str, np.ndarray],
    *,
    depth: int | None = None,
    key: Array | None = None,
) -> np.ndarray:
    """The model's best token at every position, int32 (b t).

    Args:
      model: a language model.
      batch: arguments as of a batch of `train_task`.
      depth: loops of a looped model, the trained mean if None; another number compiles nothing.
      key: draws its initial latent state; None begins at zero.
    """
    options: dict[str, Any] = {k: value for k, value in batch.items() if k != "labels"}
    if model.config.mean_depth is not None:
        options["depth"] = jnp.int32(model.config.mean_depth if depth is None else depth)
        options["key"] = key
    return np.asarray(_best(model, **options))


@jax.jit
def _best(model: Any, *, inputs: Array, **options: Any) -> Array:
    return jnp.argmax(model(inputs, **options)[0], axis=-1).astype(jnp.int32)


def task_accuracy(
    model: Any,
    batch: dict[str, np.ndarray],
    *,
    depth: int | None = None,
    key: Array | None = None,
) -> float:
    """Share of the labels that count for which the model's best token is the right one; arguments
    as of `task_predictions`.
    """
    labels = batch["labels"]
    best, counts = task_predictions(model, batch, depth=depth, key=key), labels != IGNORED
    return float(np.mean(best[counts] == labels[counts]))


def record(
    file: Path, found: dict[str, Any], place: Callable[[dict[str, Any]], Any], **shared: Any
) -> dict[str, Any]:
    """Writes what came out for one model to a file of results; models that are not trained again
    stay as the file has them.

    Args:
      file: JSON of {**shared, "models": [...], "versions": {...}}; made if it is not there.
      found: what is to be said of the model.
      place: of a model among the others, by which they are sorted; one in the same place goes.
      shared: what is the same for all models.

    Returns:
      All that the file says now.
    """
    models = json.loads(file.read_text())["models"] if file.exists() else []
    models = [model for model in models if place(model) != place(found)]
    results = shared | {"models": sorted([*models, found], key=place), "versions": versions()}
    file.write_text(json.dumps(results, indent=2) + "\n")
    return results
