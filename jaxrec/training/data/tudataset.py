"""Collections of graphs in the text format of the TUDatasets, from a folder on disk.

`DS_A.txt` holds an edge of all graphs' nodes per line, numbered from 1; `DS_graph_indicator.txt`
the graph of each node; `DS_graph_labels.txt` the label of each graph; and, if there are such,
`DS_node_labels.txt`, `DS_node_attributes.txt`, `DS_edge_labels.txt` and `DS_edge_attributes.txt` a
line for each node or edge. DS is the name of the collection and of its folder.

Morris et al., TUDataset: a collection of benchmark datasets for learning with graphs (2020),
arXiv:2007.08663.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxrec.errors import UserError
from jaxrec.training.data.graphs import Graph


def read_tudataset(folder: str | Path) -> list[Graph]:
    """Reads a collection.

    Features of nodes (and of edges) are their attributes followed by their labels, each label a
    column; nodes without either have the single feature 1. An edge that is listed both ways is one
    edge, with the features of its first line, and an edge from a node to itself is left out: it
    joins nothing. Labels of graphs become 0, 1, ... in their order.

    Args:
      folder: holds the files; its name is that of the collection, unless exactly one file ends in
        _A.txt, which then says it.

    Raises:
      UserError: a file is missing, empty, no text of numbers, or does not fit the others; the
        message names file and line.
    """
    folder = Path(folder)
    name = _name(folder)

    def file(kind: str) -> Path:
        return folder / f"{name}_{kind}.txt"

    edges = _integers(file("A"), columns=2) - 1
    graph_of = _integers(file("graph_indicator"))[:, 0] - 1
    _, labels = np.unique(_integers(file("graph_labels"))[:, 0], return_inverse=True)
    _check_graphs(file("graph_indicator"), graph_of, len(labels))
    _check_edges(file("A"), edges, graph_of)
    nodes = _features(file("node_attributes"), file("node_labels"), len(graph_of))
    if nodes is None:
        nodes = np.ones((len(graph_of), 1), np.float32)
    of_edges = _features(file("edge_attributes"), file("edge_labels"), len(edges))

    ends = np.sort(edges, axis=1)
    _, first = np.unique(ends, axis=0, return_index=True)
    kept = np.sort(first[ends[first, 0] != ends[first, 1]])
    kept = kept[np.argsort(graph_of[ends[kept, 0]], kind="stable")]
    numbers = np.arange(len(labels) + 1)
    node_from = np.searchsorted(graph_of, numbers)
    edge_from = np.searchsorted(graph_of[ends[kept, 0]], numbers)
    graphs = []
    for i, label in enumerate(labels):
        own = kept[edge_from[i] : edge_from[i + 1]]
        graphs.append(
            Graph(
                nodes[node_from[i] : node_from[i + 1]],
                ends[own] - node_from[i],
                int(label),
                None if of_edges is None else of_edges[own],
            )
        )
    return graphs


def stratified_folds(labels: Sequence[int], folds: int, *, seed: int) -> list[np.ndarray]:
    """Cuts examples into folds with about the same share of every label.

    Args:
      labels: of the examples.
      folds: their number, >= 2.
      seed: of NumPy's `default_rng`.

    Returns:
      For each fold the sorted indices of its examples; every example is in one of them.

    Raises:
      ValueError: there are fewer examples than folds, or fewer than two folds.
    """
    if not 2 <= folds <= len(labels):
        raise ValueError(
            f"stratified_folds: needs 2 <= folds <= examples, got {folds} and {len(labels)}."
        )
    rng, values = np.random.default_rng(seed), np.asarray(labels)
    dealt = np.concatenate(
        [rng.permutation(np.flatnonzero(values == label)) for label in np.unique(values)]
    )
    return [np.sort(dealt[i::folds]) for i in range(folds)]


def _name(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected one that holds a TUDataset.")
    if (folder / f"{folder.name}_A.txt").exists():
        return folder.name
    found = sorted(path.name.removesuffix("_A.txt") for path in folder.glob("*_A.txt"))
    if len(found) != 1:
        raise UserError(
            f"{folder} must hold {folder.name}_A.txt or one other file that ends in _A.txt, got"
            f" {', '.join(f'{name}_A.txt' for name in found) or 'none'}."
        )
    return found[0]


def _rows(file: Path) -> list[list[str]]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {file}: {error}.") from error
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"{file} is empty.")
    return rows


def _numbers(file: Path, columns: int | None, kind: type) -> np.ndarray:
    rows = _rows(file)
    columns = len(rows[0]) if columns is None else columns
    numbers = np.zeros((len(rows), columns), np.float64 if kind is float else np.int64)
    for i, row in enumerate(rows):
        if len(row) != columns:
            raise UserError(f"{file}, line {i + 1}: expected {columns} numbers, got {len(row)}.")
        try:
            numbers[i] = [kind(x) for x in row]
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{file}, line {i + 1}: {' '.join(row)!r} holds no {kind.__name__} that a computer"
                " number can be."
            ) from error
    return numbers


def _integers(file: Path, columns: int = 1) -> np.ndarray:
    return _numbers(file, columns, int)


def _features(attributes: Path, labels: Path, count: int) -> np.ndarray | None:
    """float32 (count features) of the files that exist."""
    parts = []
    if attributes.exists():
        parts.append((attributes, _numbers(attributes, None, float)))
    if labels.exists():
        values = _numbers(labels, None, int)
        for column in values.T:
            kinds, index = np.unique(column, return_inverse=True)
            parts.append((labels, np.eye(len(kinds))[index]))
    for file, part in parts:
        if len(part) != count:
            raise UserError(f"{file} has {len(part)} lines, expected {count}.")
        if not np.all(np.isfinite(part)):
            raise UserError(f"{file} holds numbers that are not finite.")
    if not parts:
        return None
    return np.concatenate([part for _, part in parts], axis=1).astype(np.float32)


def _check_graphs(file: Path, graph_of: np.ndarray, graphs: int) -> None:
    expected = np.unique(graph_of)
    if np.any(np.diff(graph_of) < 0):
        line = int(np.argmax(np.diff(graph_of) < 0)) + 2
        raise UserError(f"{file}, line {line}: the nodes of a graph must follow one another.")
    if not np.array_equal(expected, np.arange(graphs)):
        raise UserError(
            f"{file} must number graphs 1 .. {graphs}, as many as there are labels, each with a"
            f" node; it has {len(expected)} from {expected[0] + 1} to {expected[-1] + 1}."
        )


def _check_edges(file: Path, edges: np.ndarray, graph_of: np.ndarray) -> None:
    outside = np.any((edges < 0) | (edges >= len(graph_of)), axis=1)
    if outside.any():
        line = int(np.argmax(outside))
        raise UserError(
            f"{file}, line {line + 1}: nodes are 1 .. {len(graph_of)}, got"
            f" {' and '.join(map(str, edges[line] + 1))}."
        )
    across = graph_of[edges[:, 0]] != graph_of[edges[:, 1]]
    if across.any():
        raise UserError(
            f"{file}, line {int(np.argmax(across)) + 1}: the edge joins nodes of two graphs."
        )
