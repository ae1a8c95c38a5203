"""The graph classifier: padding, batches and the order of nodes, features of edges, directions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.plstm_graph import (
    MUTAG,
    NCI1,
    PROTEINS,
    PTC_FM,
    GraphClassifierConfig,
    graph_inputs,
    graph_orders,
    graph_shapes,
)
from jaxrec.ops.time import DagShape
from jaxrec.testing import assert_close
from tests.ops.time.graphs import random_edges

CONFIG = GraphClassifierConfig(features=3, classes=2, width=8, heads=2, mlp_factor=1)
SIZES = (1, 4, 6)


def drawn(config):
    """A model whose gates are open: those that it begins with let little through."""
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32) * 0.5), model
    )


def graphs():
    rng = np.random.default_rng(1)
    edges = [random_edges(rng, nodes, 0.7) for nodes in SIZES]
    features = [rng.normal(size=(nodes, 3)).astype(np.float32) for nodes in SIZES]
    return features, edges


run = jax.jit(lambda model, inputs: model(inputs))


def larger(shape):
    return DagShape(shape.nodes + 3, shape.edges + 5, shape.pairs + 7, 2 * shape.rounds + 1, 2)


@pytest.mark.parametrize("gates", [{}, {"max_edges": 6}], ids=["edges", "nodes"])
def test_neither_padding_nor_company_changes_the_logits(gates):
    model = drawn(dataclasses.replace(CONFIG, **gates))
    features, edges = graphs()
    orders = [graph_orders(*pair) for pair in zip(SIZES, edges, strict=True)]
    together = run(model, graph_inputs(features, orders))
    shapes = graph_shapes(orders)
    shapes = type(shapes)(*(larger(shape) for shape in shapes))
    shapes = shapes._replace(
        p=shapes.p._replace(width=16), d=shapes.d._replace(edges=shapes.p.edges)
    )
    padded = run(model, graph_inputs(features, orders, shapes=shapes))
    alone = [run(model, graph_inputs(features[i : i + 1], orders[i : i + 1])) for i in (1, 2)]
    assert_close(padded, together, rtol=3e-6)
    assert_close(np.concatenate(alone), together[1:], rtol=3e-6)


def test_edges_count_and_so_does_their_direction():
    model = drawn(CONFIG)
    [features], edges = [graphs()[0][2]], [(0, 1), (1, 2), (2, 3), (3, 5)]
    logits = [
        run(model, graph_inputs([features], [graph_orders(6, list_)]))
        for list_ in (edges, edges[:-1])
    ]
    assert np.max(np.abs(logits[0] - logits[1])) > 1e-3
    turned = graph_orders(6, [(b, a) for a, b in edges], directed=True)
    other = run(model, graph_inputs([features], [turned]))
    assert np.max(np.abs(other - logits[0])) > 1e-3


def test_features_of_edges_follow_their_edges():
    """However the list of edges is ordered."""
    model = drawn(dataclasses.replace(CONFIG, edge_features=2))
    [features] = [graphs()[0][2]]
    edges = np.array([(0, 1), (1, 2), (2, 3), (0, 4), (3, 5)])
    z = np.random.default_rng(4).normal(size=(5, 2)).astype(np.float32)

    def logits(order):
        return run(model, graph_inputs([features], [graph_orders(6, edges[order])], [z[order]]))

    straight = logits(np.arange(5))
    assert_close(logits(np.array([4, 2, 0, 3, 1])), straight, rtol=3e-6)
    z = z[::-1].copy()
    assert np.max(np.abs(logits(np.arange(5)) - straight)) > 1e-3


def test_wrong_inputs_are_refused():
    features, edges = graphs()
    orders = [graph_orders(*pair) for pair in zip(SIZES, edges, strict=True)]
    with pytest.raises(ValueError, match=r"features must have \[1, 4, 6\] rows, got \[4, 1, 6\]"):
        graph_inputs([features[i] for i in (1, 0, 2)], orders)
    model = drawn(dataclasses.replace(CONFIG, edge_features=2))
    with pytest.raises(ValueError, match="the model reads features of edges, got none"):
        model(graph_inputs(features, orders))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 3}, "width must be a multiple of heads"),
        ({"width": 9, "heads": 3}, "width must be even, got 9"),
        ({"max_edges": 4, "edge_features": 2}, "edge_features are read by gates of edges only"),
        ({"classes": 0}, "classes must be >= 1"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


def test_published_sizes():
    """Width 96 with 4 heads and 2 layers; the embedding of nodes is all that differs."""
    counts = []
    for config in (MUTAG, NCI1, PROTEINS, PTC_FM):
        model = nnx.eval_shape(lambda config=config: config.build(rngs=nnx.Rngs(0)))
        counts.append(sum(leaf.size for leaf in jax.tree.leaves(model)) - 96 * config.features)
    assert len(set(counts)) == 1 and 400_000 < counts[0] < 500_000
