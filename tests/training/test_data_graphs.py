"""Made graphs: labels against other ways to find them, shares of labels, what is refused."""

import itertools

import numpy as np
import pytest

from jaxrec.training.data.graphs import (
    classes_of,
    features_of,
    independent_cycles,
    longest_path,
    made_graphs,
    reaches,
)

TASKS = ("longest-path", "reachability", "cycles", "molecules")


def joined(nodes, edges):
    """int (nodes nodes): 1 from the lower to the higher node of every edge."""
    table = np.zeros((nodes, nodes), int)
    low, high = np.sort(edges, axis=1).T
    table[low, high] = 1
    return table


@pytest.mark.parametrize("task", TASKS)
def test_graphs_are_graphs(task):
    for graph in made_graphs(task, 40, seed=0):
        nodes, ends = len(graph.features), np.sort(graph.edges, axis=1)
        assert graph.features.shape == (nodes, features_of(task))
        assert graph.features.dtype == np.float32
        assert ends.shape[1] == 2 and len(np.unique(ends, axis=0)) == len(ends)
        assert np.all(ends >= 0) and np.all(ends < nodes) and np.all(ends[:, 0] < ends[:, 1])
        assert 0 <= graph.label < classes_of(task)


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_balanced_and_follow_from_the_seed(task):
    graphs, again = (made_graphs(task, 200, seed=3) for _ in range(2))
    shares = np.bincount([graph.label for graph in graphs], minlength=classes_of(task)) / 200
    assert np.all(shares > 0.8 / classes_of(task) - 0.05), shares
    for left, right in zip(graphs, again, strict=True):
        np.testing.assert_array_equal(left.edges, right.edges)


def test_longest_paths_and_reachability_against_powers_of_the_matrix():
    rng = np.random.default_rng(0)
    for _ in range(20):
        nodes = int(rng.integers(3, 9))
        ends = np.array(list(itertools.combinations(range(nodes), 2)))
        edges = ends[rng.random(len(ends)) < 0.4].reshape(-1, 2)
        power, length, ways = np.eye(nodes, dtype=int), 0, np.eye(nodes, dtype=int)
        while (power := power @ joined(nodes, edges)).any():
            length, ways = length + 1, ways + power
        assert longest_path(nodes, edges[::-1, ::-1]) == length
        for a, b in itertools.combinations(range(nodes), 2):
            assert reaches(nodes, edges, a, b) == (ways[a, b] > 0)


def test_labels_say_what_is_there():
    for graph in made_graphs("longest-path", 50, seed=1):
        nodes = len(graph.features)
        assert graph.label == (longest_path(nodes, graph.edges) > nodes // 2)
    for graph in made_graphs("reachability", 50, seed=1):
        (begin,), (end,) = (np.flatnonzero(graph.features[:, i]) for i in (1, 2))
        assert graph.label == reaches(len(graph.features), graph.edges, begin, end)
    for graph in made_graphs("cycles", 50, seed=1):
        # they hang together, so that edges - nodes + 1 cycles are independent
        assert graph.label == len(graph.edges) - len(graph.features) + 1


def in_ring(nodes, edges, node):
    """Whether taking out one of a node's edges leaves its ends joined."""
    for i, edge in enumerate(edges):
        rest = np.delete(edges, i, axis=0)
        if node in edge and independent_cycles(nodes, rest) < independent_cycles(nodes, edges):
            return True
    return False


def test_molecules_are_labelled_by_their_rings_and_have_no_more_bonds_than_atoms_can():
    for graph in made_graphs("molecules", 30, seed=2):
        nodes = len(graph.features)
        assert np.bincount(graph.edges.ravel()).max() <= 4
        nitrogen = np.flatnonzero(graph.features[:, 1])
        assert graph.label == any(in_ring(nodes, graph.edges, atom) for atom in nitrogen)
        assert len(graph.edges) - independent_cycles(nodes, graph.edges) == nodes - 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("diameter", 3), "task must be one of .* got 'diameter'"),
        (("cycles", 0), "count >= 1"),
        (("cycles", 3, (3, 9)), r"4 <= least <= largest .* got 3 and \(3, 9\)"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, message):
    task, count, *nodes = arguments
    with pytest.raises(ValueError, match=message):
        made_graphs(task, count, seed=0, **({"nodes": nodes[0]} if nodes else {}))
