"""Training a classifier of graphs: it learns, repeats itself, keeps sizes apart, refuses."""

import dataclasses

import numpy as np
import pytest

from jaxrec.models.plstm_graph import GraphClassifierConfig
from jaxrec.training.config import OptimizerConfig
from jaxrec.training.data.graphs import Graph, made_graphs
from jaxrec.training.graphs import (
    GraphSettings,
    bucketed,
    graph_accuracy,
    ordered,
    train_graph_classifier,
)

CONFIG = GraphClassifierConfig(features=3, classes=2, width=8, heads=2, layers=1, mlp_factor=1)
SETTINGS = GraphSettings(
    epochs=12, batch=16, warmup_epochs=1, optimizer=OptimizerConfig(learning_rate=2e-2)
)


def marked(count, seed):
    """Made graphs whose label stands in their features, so that a few steps suffice."""
    graphs = made_graphs("reachability", count, seed=seed, nodes=(4, 7))
    features = [np.roll(graph.features, graph.label, axis=1) for graph in graphs]
    pairs = zip(graphs, features, strict=True)
    return ordered([graph._replace(features=own) for graph, own in pairs])


def test_it_learns_and_a_second_run_is_the_same():
    graphs = marked(60, 0)
    train, valid = graphs[:40], graphs[40:]
    first, second = (train_graph_classifier(CONFIG, train, valid, SETTINGS) for _ in range(2))
    assert first.losses.shape == (36,) and np.all(np.isfinite(first.losses))
    assert np.mean(first.losses[-3:]) < 0.5 * first.losses[0]
    np.testing.assert_array_equal(first.losses, second.losses)
    assert graph_accuracy(first.model, valid, batch=7) == max(first.accuracies) >= 0.9


def test_graphs_of_a_size_are_padded_alike_and_none_is_lost():
    sizes = [3, 40, 16, 17, 33]
    graphs = ordered([Graph(np.full((n, 1), n, np.float32), np.array([(0, 1)]), 0) for n in sizes])
    buckets = bucketed(graphs)
    assert [bucket.inputs.nodes.shape[:2] for bucket in buckets] == [(2, 16), (1, 17), (2, 40)]
    assert sorted(n for bucket in buckets for n in bucket.inputs.nodes[:, 0, 0]) == sorted(sizes)


def test_graphs_ordered_together_keep_their_shapes_in_any_subset():
    graphs = marked(12, 0)
    [whole], [part] = bucketed(graphs), bucketed(graphs[:3])
    assert whole.inputs.nodes.shape[1:] == part.inputs.nodes.shape[1:]
    assert whole.inputs.d.schedule.shape[1:] == part.inputs.d.schedule.shape[1:]


def test_data_that_does_not_fit_is_refused():
    graphs = marked(4, 0)

    def refused(message, *train, **options):
        config = dataclasses.replace(CONFIG, **options)
        with pytest.raises(ValueError, match=message):
            train_graph_classifier(config, train, graphs, SETTINGS)

    refused("train: needs at least one graph")
    refused("graph 0 has 3 features of nodes and None of edges", *graphs, features=2)
    refused("the model reads 3 and 2", *graphs, edge_features=2)
    wrong = graphs[0]._replace(graph=graphs[0].graph._replace(label=2))
    refused(r"the label of graph 1 must lie in \[0, 2\), got 2", graphs[1], wrong)
    edges = np.ones((len(graphs[0].graph.edges), 2), np.float32)
    some = graphs[0]._replace(graph=graphs[0].graph._replace(edge_features=edges))
    with pytest.raises(ValueError, match="either all graphs have features of edges, or none"):
        bucketed([some, graphs[1]])
    with pytest.raises(ValueError, match="epochs >= 1"):
        GraphSettings(epochs=0)
