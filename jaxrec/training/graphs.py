"""Training a classifier of graphs that fit into memory.

Graphs of about one size are padded to one shape and make up batches of their own, so that a few
programs are compiled and little of what they compute is padding.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxrec.models.plstm_graph import (
    GraphClassifierConfig,
    GraphInputs,
    GraphOrders,
    GraphShapes,
    graph_inputs,
    graph_orders,
    graph_shapes,
)
from jaxrec.training import optim
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.graphs import Graph
from jaxrec.training.sharding import stacked_axes

SMALLEST_BUCKET = 16  # graphs of up to so many nodes are padded alike


class OrderedGraph(NamedTuple):
    """A graph, the order in which a model runs over it, and what it is padded to."""

    graph: Graph
    orders: GraphOrders
    shapes: GraphShapes


class Bucket(NamedTuple):
    """Graphs of about one size."""

    inputs: GraphInputs
    labels: np.ndarray  # int32 (b)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """One training run; the defaults are those of the published runs on TUDatasets."""

    epochs: int = 100
    """Passes over the training graphs, >= 1."""
    batch: int = 64
    """Graphs per step, >= 1; what is left over of a size makes a smaller batch."""
    seed: int = 0
    """Seed of the parameters and of the order of the graphs."""
    warmup_epochs: int = 5
    """Epochs in which the learning rate grows to its peak, >= 0."""
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-3,
            beta2=0.999,
            weight_decay=0.01,
            clip_norm=None,
            final_fraction=0.0,
        )
    )
    """The rule and its schedule, but for the warm-up, which is counted in epochs here."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.warmup_epochs < 0:
            raise ValueError(
                "GraphSettings: needs epochs >= 1, batch >= 1 and warmup_epochs >= 0, got"
                f" {self.epochs}, {self.batch} and {self.warmup_epochs}."
            )


class GraphResults(NamedTuple):
    """What came out of a run."""

    model: Any  # of the epoch with the best accuracy on held-out graphs, the first such
    losses: np.ndarray  # float32 (steps), nats
    accuracies: list[float]  # on held-out graphs, after each epoch


def ordered(graphs: Sequence[Graph]) -> list[OrderedGraph]:
    """Finds the orders of graphs, and what each is padded to: the largest sizes among those whose
    number of nodes has the same next power of two.

    Graphs that are ordered together share their programs, whatever sets they are split into.
    """
    orders = [graph_orders(len(graph.features), graph.edges) for graph in graphs]
    rooms = [max(1 << (len(graph.features) - 1).bit_length(), SMALLEST_BUCKET) for graph in graphs]
    shapes = {
        room: graph_shapes([one for one, own in zip(orders, rooms, strict=True) if own == room])
        for room in set(rooms)
    }
    return [
        OrderedGraph(graph, one, shapes[room])
        for graph, one, room in zip(graphs, orders, rooms, strict=True)
    ]


def bucketed(graphs: Sequence[OrderedGraph]) -> list[Bucket]:
    """Pads graphs, those of one shape together.

    Raises:
      ValueError: some graphs have features of edges and others have none.
    """
    with_edges = sum(one.graph.edge_features is not None for one in graphs)
    if with_edges not in (0, len(graphs)):
        raise ValueError("bucketed: either all graphs have features of edges, or none.")
    groups: dict[GraphShapes, list[OrderedGraph]] = {}
    for one in graphs:
        groups.setdefault(one.shapes, []).append(one)
    return [
        Bucket(
            graph_inputs(
                [one.graph.features for one in group],
                [one.orders for one in group],
                [x for one in group if (x := one.graph.edge_features) is not None]
                if with_edges
                else None,
                shapes=shapes,
            ),
            np.array([one.graph.label for one in group], np.int32),
        )
        for shapes, group in sorted(groups.items())
    ]


def train_graph_classifier(
    config: GraphClassifierConfig,
    train: Sequence[OrderedGraph],
    valid: Sequence[OrderedGraph],
    settings: GraphSettings,
) -> GraphResults:
    """Trains a freshly built model and keeps that of the best epoch.

    Args:
      config: of the model.
      train: graphs to learn from.
      valid: graphs by which the epoch is chosen.
      settings: length of the run, seed, optimizer.

    Raises:
      ValueError: graphs are missing or do not fit the model.
    """
    for name, graphs in (("train", train), ("valid", valid)):
        _check(f"train_graph_classifier: {name}", graphs, config)
    seen, held_out = bucketed(train), bucketed(valid)
    steps = sum(-(-len(bucket.labels) // settings.batch) for bucket in seen)
    rule = dataclasses.replace(settings.optimizer, warmup_steps=steps * settings.warmup_epochs)
    graph, start, step = _trainer(config, rule, steps * settings.epochs)
    params, moments = start(jax.random.key(settings.seed))
    losses = []
    rng = np.random.default_rng(settings.seed)
    best, accuracies = params, []
    for _ in range(settings.epochs):
        for batch, weights in _batches(seen, settings.batch, rng):
            params, moments, value = step(params, moments, batch, weights)
            losses.append(value)
        accuracies.append(_accuracy(nnx.merge(graph, params), held_out, settings.batch))
        if accuracies[-1] > max(accuracies[:-1], default=-1.0):
            best = params
    return GraphResults(nnx.merge(graph, best), np.array(losses), accuracies)


@functools.cache
def _trainer(
    config: GraphClassifierConfig, rule: OptimizerConfig, steps: int
) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """The model without its parameters, what begins a run, and one step of it; runs that are alike
    share what is compiled.
    """
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(model)
    transform = optim.build(rule, steps, nnx.to_pure_dict(variables), stacked_axes(model))

    @jax.jit
    def start(key: Array) -> tuple[Any, Any]:
        params = nnx.to_pure_dict(nnx.split(config.build(rngs=nnx.Rngs(key)))[1])
        return params, transform.init(params)

    @jax.jit
    def step(params: Any, moments: Any, batch: Bucket, weights: Array) -> tuple[Any, Any, Array]:
        def loss(params: Any) -> Array:
            logits = nnx.merge(graph, params)(batch.inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return jnp.sum(losses * weights) / jnp.sum(weights)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = transform.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    return graph, start, step


def graph_accuracy(model: Any, graphs: Sequence[OrderedGraph], *, batch: int = 64) -> float:
    """Share of the graphs whose label has the largest logit.

    Raises:
      ValueError: graphs are missing or do not fit the model.
    """
    _check("graph_accuracy: graphs", graphs, model.config)
    return _accuracy(model, bucketed(graphs), batch)


@jax.jit
def _predicted(model: Any, inputs: GraphInputs) -> Array:
    return jnp.argmax(model(inputs), axis=-1)


def _accuracy(model: Any, buckets: Sequence[Bucket], size: int) -> float:
    right = 0.0
    for batch, weights in _batches(buckets, size):
        right += np.sum((np.asarray(_predicted(model, batch.inputs)) == batch.labels) * weights)
    return float(right / sum(len(bucket.labels) for bucket in buckets))


def _batches(
    buckets: Sequence[Bucket], size: int, rng: np.random.Generator | None = None
) -> Iterator[tuple[Bucket, np.ndarray]]:
    """Batches of at most `size` graphs and weights 1 of each; a smaller one repeats its graphs with
    weight 0 up to `size`, or a power of two for all that its bucket has. In random order if there
    is a `rng`.
    """
    parts = []
    for bucket in buckets:
        count = len(bucket.labels)
        order = np.arange(count) if rng is None else rng.permutation(count)
        width = min(size, 1 << (count - 1).bit_length())
        for begin in range(0, count, width):
            picked = order[begin : begin + width]
            weights = np.arange(width) < len(picked)
            parts.append((bucket, np.pad(picked, (0, width - len(picked)), mode="wrap"), weights))
    for i in range(len(parts)) if rng is None else rng.permutation(len(parts)):
        bucket, picked, weights = parts[i]
        rows = jax.tree.map(lambda leaf, picked=picked: leaf[picked], bucket)
        yield rows, weights.astype(np.float32)


def _check(name: str, graphs: Sequence[OrderedGraph], config: GraphClassifierConfig) -> None:
    if not graphs:
        raise ValueError(f"{name}: needs at least one graph.")
    for i, (graph, *_) in enumerate(graphs):
        edges = None if graph.edge_features is None else graph.edge_features.shape[1]
        if graph.features.shape[1] != config.features or config.edge_features not in (None, edges):
            raise ValueError(
                f"{name}: graph {i} has {graph.features.shape[1]} features of nodes and {edges} of"
                f" edges, the model reads {config.features} and {config.edge_features}."
            )
        if not 0 <= graph.label < config.classes:
            raise ValueError(
                f"{name}: the label of graph {i} must lie in [0, {config.classes}), got"
                f" {graph.label}."
            )
