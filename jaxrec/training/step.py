"""The functions of a training run that are compiled: initialise, update, evaluate.

State is a dictionary of plain pytrees: params, opt_state, ema (or None), step, and healthy. The
model's graph is split off once, outside, which keeps the host's work per step small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrec.models.protocol import (
    LanguageModelConfig,
    loop_inputs,
    text_prefix,
    training_call,
)
from jaxrec.training import optim, sharding
from jaxrec.training.config import TrainConfig
from jaxrec.training.data.batches import IGNORED
from jaxrec.training.losses import token_losses
from jaxrec.training.sharding import OnMesh

State = dict[str, Any]
Batch = dict[str, Array]


class Steps(NamedTuple):
    """One run's compiled functions."""

    init: Callable[[], State]  # the state before the first update
    train: Callable[
        ..., tuple[State, dict[str, Array]]
    ]  # (state, batch, depth); consumes the state
    evaluate: Callable[
        ..., tuple[Array, Array]
    ]  # (params, batch, depth) -> summed nats, labels counted
    measure: Callable[
        ..., dict[str, Array]
    ]  # (params, batch) -> what the model says of itself, see `models.protocol`
    loss: Callable[
        ..., Array
    ]  # (params, batch, depth, key): what `train` differentiates, not compiled
    abstract: State  # shapes, dtypes and shardings of the state
    merge: Callable[[Any], Any]  # params -> model
    computing: Callable[[Any], Any]  # params -> model in the dtypes in which it computes


def build_steps(model_config: LanguageModelConfig, config: TrainConfig, mesh: Mesh) -> Steps:
    """Prepares a run; nothing is computed or allocated before the first call.

    Raises:
      UserError: a parameter does not divide over the mesh.
    """
    abstract_model = nnx.eval_shape(lambda: model_config.build(rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(abstract_model)
    matrices = is_matrix(abstract_model)
    optimizer = optim.build(
        config.optimizer,
        config.steps,
        nnx.to_pure_dict(variables),
        sharding.stacked_axes(abstract_model),
    )
    rate = optim.schedule(config.optimizer, config.steps)
    compute_dtype = jnp.dtype(config.precision)

    def merge(params: Any) -> Any:
        return nnx.merge(graph, params)

    def computing(params: Any) -> Any:
        return merge(cast_matrices(params, matrices, compute_dtype))

    def init() -> State:
        model = model_config.build(rngs=nnx.Rngs(config.seed))
        params = nnx.to_pure_dict(nnx.split(model)[1])
        return {
            "params": params,
            "opt_state": optimizer.init(params),
            "ema": None if config.optimizer.ema_decay is None else jax.tree.map(jnp.copy, params),
            "step": jnp.zeros((), jnp.int32),
            "healthy": jnp.ones((), jnp.bool_),
        }

    def summed_loss(
        params: Any, batch: Batch, depth: Array, key: Array, *, training: bool = True
    ) -> tuple[Array, Array]:
        model = computing(params)
        options = loop_inputs(model_config, depth, key)
        options |= {"segment_ids": batch["segment_ids"], "remat": config.remat}
        labels, prefix = batch["labels"], text_prefix(model_config, batch["segment_ids"])
        if prefix is not None:
            options["prefix"] = prefix
            labels = jnp.where(prefix, IGNORED, labels)
        if training:
            logits, penalty = training_call(model, batch["inputs"], key, options)
        else:
            logits, penalty = model(batch["inputs"], **options)[0], None
        losses, counts = token_losses(logits, labels, penalty)
        return jnp.sum(losses), jnp.sum(counts, dtype=losses.dtype)

    def loss(params: Any, batch: Batch, depth: Array, key: Array) -> Array:
        total, count = summed_loss(params, batch, depth, key)
        return total / jnp.maximum(count, 1)

    def gradient(params: Any, batch: Batch, depth: Array, key: Array) -> tuple[Any, Array]:
        """Gradient of the mean loss, and that loss, over all microbatches."""
        summed = jax.value_and_grad(summed_loss, has_aux=True)

        def one(micro: Batch, key: Array) -> tuple[Any, Array, Array]:
            (total, count), grads = summed(params, micro, depth, key)
            return grads, total, count

        if config.accumulate == 1:
            sums = one(batch, key)
        else:

            def add(sums: Any, inputs: tuple[Batch, Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, one(*inputs)), None

            micro, keys = microbatches(batch, key, config.accumulate)
            start = jax.tree.map(jnp.zeros_like, (params, jnp.zeros(()), jnp.zeros(())))
            sums, _ = jax.lax.scan(add, start, (micro, keys))
        grads, total, count = sums
        labels = jnp.maximum(count, 1)
        return jax.tree.map(lambda g: g / labels, grads), total / labels

    def train(state: State, batch: Batch, depth: Array) -> tuple[State, dict[str, Array]]:
        params, step = state["params"], state["step"]
        grads, mean_loss = gradient(params, batch, depth, step_key(config.seed, step))
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        new_params = optax.apply_updates(params, updates)
        ema = state["ema"]
        if config.optimizer.ema_decay is not None:
            ema = optim.ema_update(ema, new_params, config.optimizer.ema_decay)
        healthy = state["healthy"] & optim.all_finite((mean_loss, grad_norm, new_params))
        new = {
            "params": new_params,
            "opt_state": opt_state,
            "ema": ema,
            "step": step + 1,
            "healthy": jnp.ones((), jnp.bool_),
        }
        # After a loss or gradient that is not finite the state stays as it was before, for good:
        # the loop, which looks at the metrics one step late, still finds the parameters that the
        # bad batch met.
        new = jax.tree.map(
            lambda new, old: jnp.where(healthy, new, old), new, state | {"healthy": ~healthy}
        )
        new["healthy"] = healthy
        metrics = {
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "learning_rate": rate(step),
            "healthy": healthy,
        }
        return new, metrics

    def evaluate(params: Any, batch: Batch, depth: Array) -> tuple[Array, Array]:
        key = jax.random.key(config.seed)
        return summed_loss(params, batch, depth, key, training=False)

    def measure(params: Any, batch: Batch) -> dict[str, Array]:
        model = computing(params)
        if not hasattr(model, "measure"):
            return {}
        return model.measure(batch["inputs"], segment_ids=batch["segment_ids"])

    abstract, places = sharding.placed(jax.eval_shape(init), abstract_model, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return Steps(
        init=OnMesh(jax.jit(init, out_shardings=places), mesh),
        train=OnMesh(jax.jit(train, donate_argnums=0, out_shardings=(places, everywhere)), mesh),
        evaluate=OnMesh(jax.jit(evaluate, out_shardings=everywhere), mesh),
        measure=OnMesh(jax.jit(measure, out_shardings=everywhere), mesh),
        loss=loss,
        abstract=abstract,
        merge=merge,
        computing=computing,
    )


def step_key(seed: int, step: Array | int) -> Array:
    """The key from which all randomness of one compiled step comes."""
    return jax.random.fold_in(jax.random.key(seed), step)


def is_matrix(model: Any) -> Any:
    """A boolean per parameter, keyed as its pure dictionary: whether weight decay applies to it."""
    params = nnx.to_pure_dict(nnx.state(model))
    return optim.decay_mask(params, sharding.stacked_axes(model))


def cast_matrices(params: Any, matrices: Any, dtype: jnp.dtype) -> Any:
    """Parameters with matrices in `dtype`, whose products dominate time and memory.

    Vectors, which are norm scales, biases and decays, stay float32: they cost nothing, and a decay
    near 1 has no digits left in bfloat16.
    """
    return jax.tree.map(lambda x, matrix: x.astype(dtype) if matrix else x, params, matrices)


def microbatches(batch: Batch, key: Array, count: int) -> tuple[Batch, Array]:
    """The parts of a batch and a key for each, with a leading axis of `count`."""
    return jax.tree.map(lambda x: _parts(x, count), batch), jax.random.split(key, count)


def _parts(x: Array, count: int) -> Array:
    """(b ...) to (count b/count ...): every count-th row, so that rows stay on their device."""
    rows = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jnp.swapaxes(rows, 0, 1)
