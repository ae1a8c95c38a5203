"""Training a language model on a made task: sequences in which some positions ask for a token."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxrec.training import optim
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.losses import cross_entropy
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
    """Trains a freshly built model.

    Args:
      config: of a language model without a loop.
      batch: step -> inputs and labels (b t), where a label is a token or IGNORED, and any further
        arguments of the model, such as `prefix`. Always of the same shapes.
      steps: number of updates, >= 1.
      optimizer: and its schedule.
      seed: of the parameters.

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
    def step(params: Any, moments: Any, batch: dict[str, Array]) -> tuple[Any, Any, Array]:
        def loss(params: Any) -> Array:
            options = dict(batch)
            inputs, labels = options.pop("inputs"), options.pop("labels")
            return cross_entropy(nnx.merge(graph, params)(inputs, **options)[0], labels)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = transform.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, losses = jax.jit(transform.init)(params), []
    for i in range(steps):
        params, moments, value = step(params, moments, batch(i))
        losses.append(value)
    return TaskResults(nnx.merge(graph, params), np.array(losses))


def task_accuracy(model: Any, batch: dict[str, np.ndarray]) -> float:
    """Share of the labels that count for which the model's best token is the right one; arguments
    as of a batch of `train_task`.
    """
    options = dict(batch)
    inputs, labels = options.pop("inputs"), options.pop("labels")
    predict = jax.jit(lambda model, inputs, **options: jnp.argmax(model(inputs, **options)[0], -1))
    counts = labels != IGNORED
    return float(np.mean(np.asarray(predict(model, inputs, **options))[counts] == labels[counts]))
