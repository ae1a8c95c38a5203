"""Folders in the format of the TUDatasets: what is read, and what is refused by file and line."""

import numpy as np
import pytest

from jaxrec.errors import UserError
from jaxrec.training.data.tudataset import read_tudataset, stratified_folds

# A triangle, a single node, and a path; edges both ways, as these files have them.
FILES = {
    "A": ["1, 2", "2, 1", "2, 3", "3, 2", "3, 1", "1, 3", "6, 5", "5, 6", "6,7", "7,6", "5, 5"],
    "graph_indicator": [1, 1, 1, 2, 3, 3, 3],
    "graph_labels": [1, -1, 1],
    "node_labels": [4, 0, 4, 9, 0, 0, 4],
    "node_attributes": [f"{i}.5, -1e-1" for i in range(7)],
    "edge_labels": [0, 0, 1, 1, 0, 0, 2, 2, 1, 1, 0],
}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "TOY"
    folder.mkdir()
    for kind, lines in FILES.items():
        write(folder, kind, lines)
    return folder


def write(folder, kind, lines):
    (folder / f"TOY_{kind}.txt").write_text("\n".join(map(str, lines)) + "\n")


def test_graphs_and_their_features(folder):
    graphs = read_tudataset(folder)
    assert [graph.label for graph in graphs] == [1, 0, 1]
    assert [graph.edges.tolist() for graph in graphs] == [
        [[0, 1], [1, 2], [0, 2]],
        [],
        [[0, 1], [1, 2]],
    ]
    np.testing.assert_allclose(
        graphs[0].features,
        [[0.5, -0.1, 0, 1, 0], [1.5, -0.1, 1, 0, 0], [2.5, -0.1, 0, 1, 0]],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(graphs[1].features[0, 2:], [0, 0, 1])
    np.testing.assert_array_equal(np.argmax(graphs[0].edge_features, axis=1), [0, 1, 0])
    np.testing.assert_array_equal(np.argmax(graphs[2].edge_features, axis=1), [2, 1])
    assert graphs[1].edge_features.shape == (0, 3) and graphs[1].edges.shape == (0, 2)


def test_features_are_optional(folder):
    for kind in ("node_labels", "node_attributes", "edge_labels"):
        (folder / f"TOY_{kind}.txt").unlink()
    graphs = read_tudataset(folder)
    np.testing.assert_array_equal(graphs[0].features, np.ones((3, 1)))
    assert graphs[0].edge_features is None


def test_the_files_may_be_called_otherwise_than_the_folder(folder):
    renamed = folder.rename(folder.parent / "downloaded")
    assert len(read_tudataset(renamed)) == 3


@pytest.mark.parametrize(
    "kind, lines, message",
    [
        ("graph_labels", None, "Cannot read .*TOY_graph_labels.txt"),
        ("graph_labels", [], "TOY_graph_labels.txt is empty"),
        ("graph_labels", [1, 2], r"must number graphs 1 .. 2, .* it has 3 from 1 to 3"),
        ("graph_labels", [1, "x", 1], "labels.txt, line 2: 'x' holds no int"),
        ("graph_indicator", [1, 1, 2, 1, 3, 3, 3], "indicator.txt, line 4: the nodes of a graph"),
        ("graph_indicator", [1, 1, 1, 3, 3, 3, 3], "it has 2 from 1 to 3"),
        ("A", ["1, 2", "2, 8"], "A.txt, line 2: nodes are 1 .. 7, got 2 and 8"),
        ("A", ["1, 2", "0, 1"], "A.txt, line 2: nodes are 1 .. 7"),
        ("A", ["1, 2", "3, 4"], "A.txt, line 2: the edge joins nodes of two graphs"),
        ("A", ["1, 2", "3"], "A.txt, line 2: expected 2 numbers, got 1"),
        ("node_labels", [1, 2], "TOY_node_labels.txt has 2 lines, expected 7"),
        ("edge_labels", [1, 2], "TOY_edge_labels.txt has 2 lines, expected 11"),
        ("node_attributes", [1, 2, 3, 4, 5, 6, "nan"], "numbers that are not finite"),
        ("node_attributes", [1, 2, "1, 2", 4, 5, 6, 7], "line 3: expected 1 numbers, got 2"),
    ],
)
def test_odd_files_are_named(folder, kind, lines, message):
    if lines is None:
        (folder / f"TOY_{kind}.txt").unlink()
    else:
        write(folder, kind, lines)
    with pytest.raises(UserError, match=message):
        read_tudataset(folder)


def test_odd_folders_are_refused(folder):
    with pytest.raises(UserError, match="is no folder"):
        read_tudataset(folder / "none")
    (folder / "TOY_A.txt").unlink()
    with pytest.raises(UserError, match=r"must hold TOY_A.txt or one other .* got none"):
        read_tudataset(folder)


def test_folds_share_out_every_label():
    labels = np.repeat([0, 1, 2], [40, 23, 7])
    folds = stratified_folds(labels, 10, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate(folds)), np.arange(70))
    for label, count in enumerate((40, 23, 7)):
        shares = [np.sum(labels[fold] == label) for fold in folds]
        assert max(shares) - min(shares) <= 1 and sum(shares) == count
    assert np.any(folds[0] != stratified_folds(labels, 10, seed=1)[0])
    with pytest.raises(ValueError, match="2 <= folds <= examples, got 1 and 70"):
        stratified_folds(labels, 1, seed=0)
