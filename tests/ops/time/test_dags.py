"""The order of edges, the pairs of each mode, rounds, padding, and graphs that are refused."""

import numpy as np
import pytest

from jaxrec.ops.time import DagShape, dag, dag_batch, shape_of
from tests.ops.time.graphs import random_edges

DIAMOND = [(0, 1), (1, 2), (1, 3), (2, 4), (3, 4), (4, 5)]


def ends(graph):
    return list(zip(graph.tails.tolist(), graph.heads.tolist(), strict=True))


def pairs(graph):
    names = ends(graph)
    return {(names[a], names[b]) for a, b in zip(graph.origins, graph.targets, strict=True)}


def random_graphs(**options):
    rng = np.random.default_rng(3)
    for nodes in (2, 3, 7, 9, 12):
        edges = random_edges(rng, nodes, 0.5)
        yield edges, dag(nodes, edges, **options)


def test_p_mode_has_every_pair_that_meets():
    for _, graph in random_graphs(mode="P"):
        names = ends(graph)
        assert pairs(graph) == {(a, b) for a in names for b in names if a[1] == b[0]}


def number_of_paths(graph):
    """Paths (edges edges) between any two edges, over pairs."""
    count = len(graph.tails)
    joined = np.zeros((count, count), int)
    joined[graph.origins, graph.targets] = 1
    total, longer = np.zeros_like(joined), joined
    for _ in range(count):
        total, longer = total + longer, longer @ joined
    return total


def test_d_mode_leaves_one_path_and_takes_no_pair_out_in_vain():
    pruned = 0
    for edges, graph in random_graphs(mode="D"):
        assert np.all(number_of_paths(graph) <= 1)
        every = pairs(dag(graph.nodes, edges, mode="P"))
        assert pairs(graph) <= every
        names = ends(graph)
        for a, b in every - pairs(graph):
            more = graph._replace(
                origins=np.append(graph.origins, names.index(a)),
                targets=np.append(graph.targets, names.index(b)),
            )
            assert np.any(number_of_paths(more) > 1)
            pruned += 1
    assert pruned > 5


def test_d_mode_of_a_diamond_keeps_the_pair_that_comes_first():
    assert pairs(dag(6, DIAMOND, mode="D")) == pairs(dag(6, DIAMOND)) - {((3, 4), (4, 5))}


@pytest.mark.parametrize("mode", ["P", "D"])
def test_edges_and_rounds_are_in_an_order_that_can_be_computed(mode):
    for _, graph in random_graphs(mode=mode):
        assert np.all(graph.origins < graph.targets)
        for origin, own in zip(graph.origins, graph.rounds, strict=True):
            assert np.all(graph.rounds[graph.targets == origin] < own)


def test_undirected_edges_run_from_the_lower_node_and_keep_their_place_in_the_list():
    for edges, graph in random_graphs():
        assert np.all(graph.tails < graph.heads)
        np.testing.assert_array_equal(
            np.sort(edges[graph.edge_ids], axis=1), np.stack(graph[1:3], axis=1)
        )


def test_places_count_the_edges_of_a_node():
    for _, graph in random_graphs():
        for places, of in ((graph.out_places, graph.tails), (graph.in_places, graph.heads)):
            for node in range(graph.nodes):
                assert sorted(places[of == node]) == list(range(np.sum(of == node)))


def test_reversed_graphs_have_every_edge_turned():
    for edges, graph in random_graphs():
        turned = dag(graph.nodes, edges, reverse=True)
        assert set(ends(turned)) == {(b, a) for a, b in ends(graph)}
        assert pairs(turned) == {(b[::-1], a[::-1]) for a, b in pairs(graph)}
        np.testing.assert_array_equal(
            np.sort(edges[turned.edge_ids], axis=1), np.sort(np.stack(turned[1:3], axis=1), axis=1)
        )


def test_directed_edges_stay_as_they_are():
    graph = dag(4, [(3, 0), (0, 2), (2, 1)], directed=True)
    assert ends(graph) == [(3, 0), (0, 2), (2, 1)]
    assert ends(dag(4, [(3, 0), (0, 2), (2, 1)], directed=True, reverse=True)) == [
        (1, 2),
        (2, 0),
        (0, 3),
    ]


def test_rounds_hold_every_pair_once_and_nothing_too_early():
    graphs = [graph for _, graph in random_graphs()]
    for width in (None, 1, 3):
        shape = shape_of(graphs, width)
        batch = dag_batch(graphs, shape)
        assert batch.schedule.shape == (len(graphs), shape.rounds, shape.width)
        for graph, rounds in zip(graphs, batch.schedule, strict=True):
            real = rounds < shape.pairs
            assert sorted(rounds[real]) == list(range(len(graph.origins)))
            when = np.broadcast_to(np.arange(shape.rounds)[:, None], rounds.shape)[real]
            done = dict(zip(rounds[real].tolist(), when.tolist(), strict=True))
            for pair, origin in enumerate(graph.origins):
                before = np.flatnonzero(graph.targets == origin)
                assert all(done[int(other)] < done[pair] for other in before)


def test_padding_has_no_neighbours():
    graphs = [dag(1, []), dag(6, DIAMOND)]
    batch = dag_batch(graphs, DagShape(8, 7, 9, 4, 4))
    assert batch.is_node.sum(axis=1).tolist() == [1, 6]
    assert batch.is_edge.sum(axis=1).tolist() == [0, 6]
    assert np.all(batch.tails[~batch.is_edge] == 8) and np.all(batch.heads[~batch.is_edge] == 8)
    assert np.all(batch.origins[0] == 7) and np.all(batch.schedule[0] == 9)


@pytest.mark.parametrize(
    "nodes, edges, options, message",
    [
        (3, [(0, 1), (1, 2), (2, 0)], {"directed": True}, "the edges form a cycle"),
        (3, [(1, 1)], {}, "node 1 has an edge to itself"),
        (3, [(0, 1), (1, 0)], {}, "an edge occurs twice"),
        (3, [(0, 3)], {}, r"nodes are 0 .. 2, but an edge names 3"),
        (3, [(0, -1)], {}, "an edge names -1"),
        (3, [(0.0, 1.0)], {}, r"edges must be int \(edges 2\), got float64 \(1, 2\)"),
        (3, [(0, 1, 2)], {}, r"edges must be int \(edges 2\), got int64 \(1, 3\)"),
        (0, [], {}, "at least one node"),
        (3, [(0, 1)], {"mode": "Q"}, "mode must be P or D, got 'Q'"),
    ],
)
def test_what_is_no_graph_is_refused(nodes, edges, options, message):
    with pytest.raises(ValueError, match=message):
        dag(nodes, edges, **options)


def test_a_graph_larger_than_the_padding_is_refused():
    graphs = [dag(2, [(0, 1)]), dag(6, DIAMOND)]
    shape = shape_of(graphs)
    for name in ("nodes", "edges", "pairs", "rounds"):
        less = shape._replace(**{name: getattr(shape, name) - 1})
        with pytest.raises(ValueError, match=rf"graph 1 has \d+ {name}, but is to be padded to"):
            dag_batch(graphs, less)
    with pytest.raises(ValueError, match="at least one graph"):
        dag_batch([])
