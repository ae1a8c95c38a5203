"""Graphs with known labels, made on the fly."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np

Task = Literal["longest-path", "reachability", "cycles", "molecules"]

ATOMS = 4  # carbon, nitrogen, oxygen, halogen
RING_SIZES = (5, 6)
MOST_BONDS = 3  # of an atom of the skeleton, so that a substituent still fits


class Graph(NamedTuple):
    """An undirected graph; as an acyclic one its edges run from the lower to the higher node."""

    features: np.ndarray  # float32 (nodes features)
    edges: np.ndarray  # int64 (edges 2), each once
    label: int
    edge_features: np.ndarray | None = None  # float32 (edges features)


def made_graphs(
    task: Task, count: int, *, seed: int, nodes: tuple[int, int] = (6, 14)
) -> list[Graph]:
    """Graphs whose labels follow from what they are.

    Args:
      task: "longest-path": label 1 if the longest path has more edges than half the nodes;
        "reachability": whether a path leads from the first to the second of two marked nodes;
        "cycles": the number of independent cycles, at most 3; "molecules": whether a nitrogen is
        part of a ring, among rings, chains and substituents.
      count: number of graphs, >= 1.
      seed: of NumPy's `default_rng`.
      nodes: least and largest number of nodes; of molecules only the largest counts, and is
        exceeded by a ring at most.

    Returns:
      Graphs with as many features of nodes as `features_of(task)`, labels below `classes_of(task)`;
      for the tasks with two labels each in about half of the graphs.

    Raises:
      ValueError: the task is unknown, there is nothing to make, or no graph has so many nodes.
    """
    if task not in get_args(Task):
        raise ValueError(f"made_graphs: task must be one of {get_args(Task)}, got {task!r}.")
    if count < 1 or not 4 <= nodes[0] <= nodes[1]:
        raise ValueError(
            f"made_graphs: needs count >= 1 and 4 <= least <= largest number of nodes, got {count}"
            f" and {nodes}."
        )
    rng = np.random.default_rng(seed)
    make = {
        "longest-path": _with_longest_path,
        "reachability": _with_two_marks,
        "cycles": _with_cycles,
        "molecules": _molecule,
    }[task]
    if classes_of(task) > 2:
        return [make(rng, nodes) for _ in range(count)]
    return [_labelled(make, rng, nodes, label) for label in rng.permutation(np.arange(count) % 2)]


def features_of(task: Task) -> int:
    """Features of a node."""
    return {"reachability": 3, "molecules": ATOMS}.get(task, 1)


def classes_of(task: Task) -> int:
    """Labels of a task."""
    return 4 if task == "cycles" else 2


def random_edges(rng: np.random.Generator, nodes: int, share: float) -> np.ndarray:
    """Each pair of nodes with a probability: int64 (edges 2), the lower node first."""
    ends = np.stack(np.triu_indices(nodes, 1), axis=1)
    return ends[rng.random(len(ends)) < share]


def longest_path(nodes: int, edges: np.ndarray) -> int:
    """Edges of the longest path along edges (edges 2), each from its lower to its higher node."""
    longest = np.zeros(nodes, np.int64)
    for tail, head in sorted(np.sort(edges, axis=1).tolist()):
        longest[head] = max(longest[head], longest[tail] + 1)
    return int(longest.max())


def reaches(nodes: int, edges: np.ndarray, begin: int, end: int) -> bool:
    """Whether a path from node `begin` leads to node `end`; edges as in `longest_path`."""
    reached = np.zeros(nodes, bool)
    reached[begin] = True
    for tail, head in sorted(np.sort(edges, axis=1).tolist()):
        reached[head] |= reached[tail]
    return bool(reached[end])


def independent_cycles(nodes: int, edges: np.ndarray) -> int:
    """Edges (edges 2) that can be taken out before the graph falls into more parts."""
    part = list(range(nodes))

    def root(node: int) -> int:
        while part[node] != node:
            node = part[node]
        return node

    cycles = 0
    for a, b in edges.tolist():
        a, b = root(a), root(b)
        cycles += a == b
        part[a] = b
    return cycles


Make = Callable[[np.random.Generator, tuple[int, int]], Graph]


def _labelled(make: Make, rng: np.random.Generator, nodes: tuple[int, int], label: int) -> Graph:
    while True:
        graph = make(rng, nodes)
        if graph.label == label:
            return graph


def _number(rng: np.random.Generator, nodes: tuple[int, int]) -> int:
    return int(rng.integers(nodes[0], nodes[1] + 1))


def _with_longest_path(rng: np.random.Generator, nodes: tuple[int, int]) -> Graph:
    count = _number(rng, nodes)
    edges = random_edges(rng, count, rng.uniform(0.15, 0.6))
    label = longest_path(count, edges) > count // 2
    return Graph(np.ones((count, 1), np.float32), edges, int(label))


def _with_two_marks(rng: np.random.Generator, nodes: tuple[int, int]) -> Graph:
    count = _number(rng, nodes)
    edges = random_edges(rng, count, 2.0 / count)
    begin, end = np.sort(rng.choice(count, 2, replace=False)).tolist()
    features = np.zeros((count, 3), np.float32)
    features[:, 0] = 1
    features[begin], features[end] = np.eye(3, dtype=np.float32)[1:]
    return Graph(features, edges, int(reaches(count, edges, begin, end)))


def _with_cycles(rng: np.random.Generator, nodes: tuple[int, int]) -> Graph:
    """A tree and as many edges more as there are to be cycles, numbered at random."""
    count, cycles = _number(rng, nodes), int(rng.integers(4))
    edges = {(int(rng.integers(node)), node) for node in range(1, count)}
    while len(edges) < min(count - 1 + cycles, count * (count - 1) // 2):
        a, b = np.sort(rng.choice(count, 2, replace=False)).tolist()
        edges.add((a, b))
    ends = np.sort(rng.permutation(count)[np.array(sorted(edges))], axis=1)
    label = independent_cycles(count, ends)
    return Graph(np.ones((count, 1), np.float32), ends, label)


def _molecule(rng: np.random.Generator, nodes: tuple[int, int]) -> Graph:
    """Rings and chains of atoms one after another, each bound to an earlier atom with room."""
    edges: list[tuple[int, int]] = []
    bonds: list[int] = []
    in_ring: list[bool] = []
    while len(bonds) < nodes[1]:
        ring = rng.random() < 0.4
        size = int(rng.choice(RING_SIZES)) if ring else int(rng.integers(1, 4))
        begin = len(bonds)
        added = [(begin + i, begin + i + 1) for i in range(size - 1)]
        added += [(begin, begin + size - 1)] if ring else []
        free = [atom for atom, count in enumerate(bonds) if count < MOST_BONDS]
        added += [(int(rng.choice(free)), begin)] if free else []
        bonds += [0] * size
        in_ring += [ring] * size
        for a, b in added:
            bonds[a] += 1
            bonds[b] += 1
        edges += added
    atoms = rng.choice(ATOMS, len(bonds), p=(0.75, 0.1, 0.1, 0.05))
    label = np.any((atoms == 1) & np.array(in_ring))
    return Graph(np.eye(ATOMS, dtype=np.float32)[atoms], np.array(edges), int(label))
