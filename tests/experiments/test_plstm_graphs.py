"""The experiment's small run works on a made task, and on a TUDataset folder."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrec.models.graph_classifier import GraphClassifierConfig
from jaxrec.training.data.graphs import made_graphs
from jaxrec.training.graphs import bucketed, ordered
from tests.experiments.smoke import EXPERIMENTS, smoke
from tests.models import toy


@pytest.mark.slow  # two models to compile
def test_smoke(tmp_path):
    tasks = smoke("plstm_graphs", tmp_path)["tasks"]
    for name in ("with transitions", "neighbours only"):
        [accuracy] = tasks["reachability"][name]["accuracy"]
        assert 0 <= accuracy <= 1


@pytest.mark.parametrize(("features", "classes"), [(7, 2), (37, 2), (3, 2), (18, 2)])
def test_the_published_model_fits_a_batch(features, classes):
    """MUTAG, NCI1, PROTEINS and PTC_FM have so many labels of nodes; shapes only."""
    graphs = ordered(made_graphs("molecules", 64, seed=0))
    [bucket] = bucketed(
        [one._replace(shapes=max(other.shapes for other in graphs)) for one in graphs]
    )
    nodes = np.zeros((*bucket.inputs.nodes.shape[:2], features), np.float32)
    inputs = bucket.inputs._replace(nodes=nodes)
    config = GraphClassifierConfig(features=features, classes=classes)
    assert (config.width, config.heads, config.layers) == (96, 4, 2)
    logits = jax.eval_shape(lambda x: toy.abstract(config)(x), inputs)
    assert logits.shape == (64, classes) and logits.dtype == np.float32


@pytest.mark.slow  # a model of full size, over its whole schedule
def test_the_published_run_on_a_folder(tmp_path):
    graphs = made_graphs("molecules", 20, seed=0, nodes=(4, 6))
    sizes = [len(graph.features) for graph in graphs]
    begin = [sum(sizes[:i]) + 1 for i in range(len(sizes))]
    lines = {
        "A": [
            f"{a + at}, {b + at}" for g, at in zip(graphs, begin, strict=True) for a, b in g.edges
        ],
        "graph_indicator": [i + 1 for i, size in enumerate(sizes) for _ in range(size)],
        "graph_labels": [graph.label for graph in graphs],
        "node_labels": [int(atom) for graph in graphs for atom in graph.features.argmax(axis=1)],
    }
    folder = tmp_path / "TOY"
    folder.mkdir()
    for kind, rows in lines.items():
        (folder / f"TOY_{kind}.txt").write_text("\n".join(map(str, rows)))
    command = [sys.executable, str(EXPERIMENTS / "plstm_graphs" / "run.py")]
    command += ["--tudataset", str(folder), "--folds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["graphs"] == 20 and len(result["accuracies"]) == 1
